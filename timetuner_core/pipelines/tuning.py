"""`tune_pipeline`: a schedule for a whole pipeline of diffusers, from prompts alone.

The pipeline is called, and nothing else: its latents at few steps are compared with its own latents at many. Grid,
ratios and solver are changed together, by Gauss-Newton steps on difference quotients (see `tuning.levenberg`). There is
no backward pass. The runs of a Jacobian share the calls of the network (see `shared_calls`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from timetuner_core.evaluation.distances import mean_estimate, teacher_l2
from timetuner_core.evaluation.verdict import Evaluation, compare, of_scales
from timetuner_core.grids import teacher_timesteps
from timetuner_core.pipelines.checks import (
    Prompts,
    check_call,
    check_sampler,
    check_tunable,
    read_prompts,
    split_prompts,
    split_scales,
    split_sizes,
    takes_prompts,
)
from timetuner_core.pipelines.runs import Pair, Progress, Runs, Solver, Solvers
from timetuner_core.pipelines.schedule import PipelineSchedule, key_of
from timetuner_core.pipelines.shared_calls import MAX_BATCH, MAX_THREADS, SharedCalls
from timetuner_core.tuning.draws import keyed_generator
from timetuner_core.tuning.levenberg import (
    FIRST_DAMPING,
    MAX_FRUITLESS,
    Candidate,
    Residuals,
    improve,
    quotient_units_of,
)
from timetuner_core.tuning.solver_columns import COMPARED_PER_SAMPLE, NUM_CANDIDATES, Column, solver_columns
from timetuner_core.tuning_setup import (
    EVALUATION_SEEDS,
    SEED_RANGE,
    TUNING_SEEDS,
    drawn_scales,
    evaluated_scales,
)

MIN_SAMPLES = 2  # An interval needs two samples.


@dataclass(frozen=True)
class PipelineState:
    """All that a tuning run needs to go on: plain numbers, which JSON keeps exactly.

    Attributes:
        settings: what the run was started with. A state goes on only with the same.
        start: the grid that it began with.
        iterations: how many are done. losses: the mean distance to the teacher after each.
        damping, fruitless: the optimiser's memory.
    """

    settings: dict[str, Any]
    start: list[float]
    timesteps: list[float]
    t_ratios: list[float]
    offsets: list[list[float]]
    damping: float = FIRST_DAMPING
    fruitless: int = 0
    iterations: int = 0
    losses: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PipelineState":
        """The state that `to_dict` wrote."""
        return cls(**values)

    @classmethod
    def at(cls, settings: dict[str, Any], grid: Tensor) -> "PipelineState":
        """Nothing tuned yet, on a grid `(num_steps + 1,)`."""
        num_steps = len(grid) - 1
        offsets = [[0.0] * (num_steps + 1) for _ in range(num_steps)]
        return cls(settings, grid.tolist(), grid.tolist(), [1.0] * num_steps, offsets)

    @property
    def candidate(self) -> Candidate:
        parts = (torch.tensor(each, dtype=torch.float64) for each in (self.timesteps, self.t_ratios, self.offsets))
        return Candidate(*parts)


def tune_pipeline(
    pipeline: Any,
    prompts: Prompts = None,
    num_steps: int = 6,
    guidance_scale: float | Sequence[float] | None = None,
    *,
    sampler: str = "dpmpp_2m",
    teacher_num_steps: int = 50,
    total_iters: int = 4,
    num_samples: int = 8,
    num_held_out: int = 16,
    seed: int = 0,
    max_batch: int = MAX_BATCH,
    max_threads: int = MAX_THREADS,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    is_cancelled: Callable[[], bool] = lambda: False,
    on_state: Callable[[PipelineState], None] = lambda state: None,
    state: PipelineState | None = None,
    **call: Any,
) -> PipelineSchedule:
    """Find the time grid, ratios and solver with which a pipeline's images at few steps are closest to those at many.

        schedule = tune_pipeline(pipeline, prompts, num_steps=6)
        pipeline.scheduler = schedule.scheduler(pipeline)
        pipeline(prompt, num_inference_steps=6)

    The teacher is the pipeline itself, in its own precision, with the same sampler at `teacher_num_steps`. The pipeline
    is left as it was. Its network is called forward only, for at most `max_batch` rows at a time.

    The teacher takes `teacher_num_steps` for each of `3 num_samples` tuned and `num_held_out` held-out images. An
    iteration takes `num_samples` times the runs of a Jacobian, about `num_steps ** 2 / 2 + 3 num_steps`, and `8
    num_samples` runs of candidates. The evaluation takes `3 num_steps` for each held-out image. `Progress.total` tells
    the sum before the teacher's first step.

    Args:
        pipeline: a `DiffusionPipeline` of diffusers, but those that are trained for few steps.
        prompts: a list, or the path of a file with one per line; None takes our own. Every fourth is held out for the
            evaluation. Pipelines without prompts take None.
        guidance_scale: None is the pipeline's default. Two are an interval, lowest and highest: each image is tuned at
            a scale drawn from it, the verdict is on both ends and the middle, and the schedule belongs to all between.
        call: further arguments of every call, by its signature. Lists
            of heights, widths or numbers of frames are several sizes, which images have in turn: the schedule then
            belongs to all sizes from the smallest to the largest.
        sampler: one without noise that calls the network once per step.
        num_samples: images of the Jacobian in each iteration; candidates are compared on twice as many others.
        num_held_out: images of the evaluation, from held-out prompts and other seeds.
        on_progress: told after each step. on_state: told what to keep, after each iteration.
        is_cancelled: asked after each step; running calls end by the pipeline's own interrupt.
        state: goes on from there, to the numbers of an unbroken run.

    Raises:
        ValueError: a prompt, an argument or a pipeline that is not accepted; before any work.
        RunCancelledError: `is_cancelled` said so.
        ArithmeticError: no solver gives finite latents.
    """
    numbers = {"num_steps": (num_steps, 1), "teacher_num_steps": (teacher_num_steps, num_steps + 1)}
    numbers |= {"total_iters": (total_iters, 1), "num_samples": (num_samples, 1), "max_threads": (max_threads, 1)}
    numbers |= {"num_held_out": (num_held_out, MIN_SAMPLES), "max_batch": (max_batch, 1)}
    _check_numbers(numbers)
    check_tunable(pipeline)
    if guidance_scale is not None:
        call = {"guidance_scale": guidance_scale, **call}
    check_call(pipeline, call)
    call, sizes = split_sizes(call)
    call, scales = split_scales(call)
    if takes_prompts(pipeline):
        tuned_prompts, held_out_prompts = split_prompts(read_prompts(prompts))
    elif prompts is not None:
        raise ValueError(f"prompts are given, which {type(pipeline).__name__} does not take; accepted: None")
    else:
        tuned_prompts, held_out_prompts = [], []
    solvers = Solvers(pipeline, check_sampler(sampler))
    key = _key(pipeline, guidance_scale, call, sizes)
    settings = {"key": key, "sampler": sampler, "teacher_num_steps": teacher_num_steps, "num_samples": num_samples}
    settings |= {"num_steps": num_steps, "prompts": tuned_prompts, "sizes": sizes, "seed": seed}
    if state is not None and state.settings != settings:
        different = [name for name in settings if state.settings.get(name) != settings[name]]
        raise ValueError(f"state is that of another {', '.join(different)}; accepted: one of the same run")

    num_tuned = (1 + COMPARED_PER_SAMPLE) * num_samples
    drawn = None if scales is None else drawn_scales(scales, num_tuned, seed).tolist()
    tuned = _pairs(tuned_prompts, sizes, num_tuned, TUNING_SEEDS + seed % SEED_RANGE, drawn)
    held_out = _pairs(held_out_prompts, sizes, num_held_out, EVALUATION_SEEDS + seed % SEED_RANGE)
    shared = SharedCalls(pipeline, max_batch=max_batch, max_threads=max_threads)
    runs = Runs(pipeline, shared, call, on_progress, is_cancelled)
    look = runs.look(solvers, tuned[0], num_steps)
    solvers.learn_tables = look.starts_at_first_step
    columns = _columns(solvers, num_steps)
    runs_of_iteration = num_samples * (1 + len(columns) + COMPARED_PER_SAMPLE * NUM_CANDIDATES)
    runs.plan(
        {
            "teacher": teacher_num_steps * len(tuned),
            "start": num_steps * len(look.grids) * len(tuned) if state is None else 0,
            "tuning": num_steps * (total_iters - (state.iterations if state else 0)) * runs_of_iteration,
            "evaluation": (teacher_num_steps + 3 * num_steps) * num_held_out * len(_judged_at(scales)),
        }
    )
    teacher = solvers.untuned(teacher_timesteps(solvers.noise_schedule, teacher_num_steps))
    taught = runs.latents("teacher", [teacher], tuned)[0]
    if state is None:
        latents = runs.latents("start", [solvers.untuned(grid) for grid in look.grids], tuned)
        distances = (latents - taught).norm(dim=2).mean(dim=1)
        state = PipelineState.at(settings, look.grids[int(distances.argmin())])
    while state.iterations < total_iters and state.fruitless < MAX_FRUITLESS:
        state = _next_state(runs, solvers, state, columns, tuned, taught)
        on_state(state)

    before = {"untuned": solvers.untuned(torch.tensor(state.start, dtype=torch.float64))}
    if look.native is not None:
        before["native"] = look.native
    evaluation = _evaluate_at_scales(runs, held_out, scales, teacher, before, solvers.tuned(state.candidate))
    costs = {"network_calls": shared.num_calls, "largest_batch": shared.most_rows}
    costs |= {"teacher_num_steps": teacher_num_steps}
    return PipelineSchedule(**solvers.fields_of(state.candidate), key=key, evaluation=evaluation | costs)


def _columns(solvers: Solvers, num_steps: int) -> list[Column]:
    """The numbers to learn."""
    columns = solver_columns(num_steps, with_start=solvers.noise_schedule.can_start_later)
    return columns if solvers.learn_tables else [each for each in columns if each.kind in ("t_ratio", "time")]


def _key(
    pipeline: Any,
    guidance_scale: float | Sequence[float] | None,
    call: Mapping[str, Any],
    sizes: Sequence[Mapping[str, int]],
) -> dict[str, Any]:
    """The key of a schedule for all these sizes and guidance scales."""
    several = {name: [size[name] for size in sizes] for name in sizes[0]}
    others = {name: value for name, value in call.items() if name != "guidance_scale"}
    return key_of(pipeline, guidance_scale, others | several)


def _check_numbers(numbers: Mapping[str, tuple[Any, int]]) -> None:
    """Refuse a value that is no whole number, or below the least, by its name. Raises: ValueError."""
    for name, (value, least) in numbers.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; accepted: a whole number, {least} or more")


def _next_state(
    runs: Runs,
    solvers: Solvers,
    state: PipelineState,
    columns: Sequence[Column],
    tuned: Sequence[Pair],
    taught: Tensor,
) -> PipelineState:
    """One iteration."""
    num_samples: int = state.settings["num_samples"]
    order = torch.randperm(len(tuned), generator=keyed_generator(state.settings["seed"], 0, state.iterations))

    def residuals(rows: Tensor) -> Residuals:
        pairs = [tuned[row] for row in rows.tolist()]
        return lambda candidates, _: [
            runs.latents("tuning", list(map(solvers.tuned, candidates)), pairs) - taught[rows]
        ]

    found = improve(
        state.candidate,
        columns,
        state.damping,
        solvers.noise_schedule,
        residuals(order[:num_samples]),
        residuals(order[num_samples:]),
        quotient_units_of(runs.network_dtypes),
    )
    return replace(
        state,
        timesteps=found.candidate.timesteps.tolist(),
        t_ratios=found.candidate.t_ratios.tolist(),
        offsets=found.candidate.offsets.tolist(),
        damping=found.damping,
        fruitless=state.fruitless + 1 if found.is_fruitless else 0,
        iterations=state.iterations + 1,
        losses=[*state.losses, found.loss],
    )


def _judged_at(scales: tuple[float, float] | None) -> list[float | None]:
    """The guidance scales that the verdict is on; None is that of the call."""
    return [None] if scales is None else [*evaluated_scales(scales)]


def _evaluate_at_scales(
    runs: Runs,
    held_out: Sequence[Pair],
    scales: tuple[float, float] | None,
    teacher: Solver,
    before: Mapping[str, Solver],
    tuned: Solver,
) -> dict[str, Any]:
    """The verdict; of an interval of guidance scales, that of the scale that decides, and all `at_scales`."""
    found = {
        scale: _evaluate(runs, [pair._replace(guidance_scale=scale) for pair in held_out], teacher, before, tuned)
        for scale in _judged_at(scales)
    }
    if None in found:
        evaluation, compared = found[None]
        return evaluation.to_dict() | compared
    whole = of_scales({scale: evaluation for scale, (evaluation, _) in found.items() if scale is not None})
    assert whole.guidance_scale is not None
    of_each = [
        {"guidance_scale": scale, **each.to_dict(), **found[scale][1]} for scale, each in whole.at_scales.items()
    ]
    decides = found[whole.guidance_scale][1] | {"guidance_scale": whole.guidance_scale}
    return whole.to_dict() | decides | {"at_scales": of_each}


def _evaluate(
    runs: Runs, held_out: Sequence[Pair], teacher: Solver, before: Mapping[str, Solver], tuned: Solver
) -> tuple[Evaluation, dict[str, Any]]:
    """The verdict on held-out prompts and seeds against the better of the solvers `before`, and all distances."""
    taught, *samples = runs.latents("evaluation", [teacher, *before.values(), tuned], held_out)
    *others, after = (mean_estimate(teacher_l2(each, taught)) for each in samples)
    distances = dict(zip(before, others, strict=True))
    best = min(distances, key=lambda name: distances[name].value)
    evaluation = compare({"teacher_l2": distances[best]}, {"teacher_l2": after})
    by_name = {name: estimate.value for name, estimate in distances.items()} | {"tuned": after.value}
    return evaluation, {"compared_with": best, "distances": by_name}


def _pairs(
    prompts: Sequence[str],
    sizes: Sequence[Mapping[str, int]],
    count: int,
    first_seed: int,
    scales: Sequence[float] | None = None,
) -> list[Pair]:
    """So many pairs: prompts and sizes in turn, a seed for each, and one of `scales`, if there are several.

    All sizes come before the next prompt.
    """
    given: Sequence[str | None] = prompts or [None]
    each = [(prompt, size) for prompt in given for size in sizes]
    return [
        Pair(prompt, first_seed + i, size, None if scales is None else scales[i])
        for i, (prompt, size) in enumerate(islice(cycle(each), count))
    ]
