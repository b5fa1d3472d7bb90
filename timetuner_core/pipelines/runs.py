"""Runs of a pipeline from prompts and seeds, by solvers: untuned, tuned, or the pipeline's own scheduler."""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from timetuner_core.grids import make_timesteps
from timetuner_core.integrations.time_tuner_scheduler import MIN_FLOW_START, TimeTunerScheduler
from timetuner_core.models.schedulers import grid_of, read_scheduler_config, stock_scheduler
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.pipelines.kinds import OUTPUT_TYPES
from timetuner_core.pipelines.shared_calls import Request, Result, SharedCalls
from timetuner_core.samplers import Sampler
from timetuner_core.tuning.levenberg import Candidate


class Pair(NamedTuple):
    """The inputs that an image is made from.

    Attributes:
        prompt: None where the pipeline takes none.
        sizes: its height, width or number of frames, where images have several sizes.
        guidance_scale: where images have several.
    """

    prompt: str | None
    seed: int
    sizes: Mapping[str, int]
    guidance_scale: float | None = None


class Solver(NamedTuple):
    """A way to sample: it makes a new scheduler for each run."""

    scheduler: Callable[[], Any]
    num_steps: int


@dataclass(frozen=True)
class Progress:
    """How far a tuning run is.

    Attributes:
        phase: `start`, `teacher`, `tuning` or `evaluation`.
        done, total: answers of the denoiser that single images wait for, those from memory among them. A run that ends
            early leaves some out.
        phases: the same for each phase by name, in the order in which they end; empty until the first image tells the
            calls of a step.
        num_calls: calls of the network. num_rows: rows that were put through it.
    """

    phase: str
    done: int
    total: int
    phases: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    num_rows: int = 0
    num_calls: int = 0


class Look(NamedTuple):
    """The facts of a pipeline that a first image tells.

    Attributes:
        native: the pipeline's own scheduler; None if that cannot run in so many steps.
        grids: what a tuner may begin with.
        starts_at_first_step: whether sampling does, as a learned table needs; image-to-image does not.
    """

    native: Solver | None
    grids: list[Tensor]
    starts_at_first_step: bool


@dataclass
class Solvers:
    """Solvers of one sampler for one pipeline.

    Attributes:
        learn_tables: whether tuned solvers have a table of their own.
    """

    pipeline: Any
    sampler: Sampler
    learn_tables: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the scheduler that the pipeline came with."""
        config = json.loads(self.pipeline.scheduler.to_json_string())
        base: dict[str, Any] = config.get("base_scheduler", config)
        return base

    @cached_property
    def noise_schedule(self) -> NoiseSchedule:
        return read_scheduler_config(self.config).noise_schedule

    def untuned(self, grid: Tensor) -> Solver:
        """The sampler on a grid `(num_steps + 1,)`."""
        fields = {"timesteps": grid.tolist(), "sampler": self.sampler.name}
        return Solver(lambda: TimeTunerScheduler(self.config, **fields), len(grid) - 1)

    def tuned(self, candidate: Candidate) -> Solver:
        """A candidate's solver."""
        fields = self.fields_of(candidate)
        return Solver(lambda: TimeTunerScheduler(self.config, **fields), len(candidate.t_ratios))

    def fields_of(self, candidate: Candidate) -> dict[str, Any]:
        """Grid, ratios, sampler and table, as a schedule has them."""
        clipping = read_scheduler_config(self.config).clipping
        table = candidate.table(self.sampler, self.noise_schedule, clipping).to_dict() if self.learn_tables else None
        grid, ratios = candidate.timesteps.tolist(), candidate.t_ratios.tolist()
        return {"timesteps": grid, "t_ratios": ratios, "sampler": self.sampler.name, "solver_table": table}


class Runs:
    """Runs of a pipeline, whose calls of the network are shared.

    Args:
        call: arguments of each call besides prompt, seed and number of steps.
        on_progress: told after each step of all runs. is_cancelled: asked then.
    """

    def __init__(
        self,
        pipeline: Any,
        shared: SharedCalls,
        call: Mapping[str, Any],
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._shared = shared
        self._on_progress, self._is_cancelled = on_progress, is_cancelled
        self._calls_per_step = 1.0
        self._planned: dict[str, int] = {}
        self._done: Counter[str] = Counter()
        self._most_values = 0
        parameters = inspect.signature(type(pipeline).__call__).parameters
        output_type = OUTPUT_TYPES.get(type(pipeline).__name__, "latent")
        self._call = {**call, **({"output_type": output_type} if "output_type" in parameters else {})}

    @property
    def network_dtypes(self) -> list[torch.dtype]:
        return [network.dtype for network in self._shared.networks.values()]

    def plan(self, steps: Mapping[str, int]) -> None:
        """Tell how many steps of single images are to come in each phase."""
        self._planned = {phase: self._done[phase] + round(n * self._calls_per_step) for phase, n in steps.items()}

    def look(self, solvers: Solvers, pair: Pair, num_steps: int) -> Look:
        """Make a first image, by an untuned sampler and by the pipeline's own scheduler.

        Raises:
            what the pipeline raises.
        """
        schedule = solvers.noise_schedule
        grids = [make_timesteps(schedule, num_steps)]
        if num_steps > 1:
            grids.append(make_timesteps(schedule, num_steps, "log_snr"))
        native = stock_scheduler(solvers.config)
        requests = [self._request(solvers.untuned(grids[0]), pair)]
        if native is not None:
            requests.append(self._request(Solver(lambda: native, num_steps), pair))
        own, *others = self._run("start", requests)
        own.latents  # noqa: B018 (it raises the run's own error)
        self._calls_per_step = own.num_calls / (num_steps - (own.first_step or 0))
        has_native = bool(others) and others[0].error is None
        if has_native:
            stock = grid_of(native, schedule, num_steps)
            if stock is not None and schedule.starting_std(stock[0]) >= MIN_FLOW_START * schedule.prior_std:
                grids.append(stock)
        make_native = Solver(lambda: stock_scheduler(solvers.config), num_steps)
        return Look(make_native if has_native else None, grids, own.first_step == 0)

    def latents(self, phase: str, solvers: Sequence[Solver], pairs: Sequence[Pair]) -> Tensor:
        """The latents of several solvers from the same pairs, `(len(solvers), len(pairs), D)`, float32 on the CPU.

        Numbers that are not finite are infinite. Smaller latents than the largest so far end with zeros. Until a solver
        differs from the first one, it takes no calls of the network.
        """
        numbered = [(number, solver, pair) for pair in pairs for number, solver in enumerate(solvers)]
        requests = [self._request(solver, pair, is_remembered=number == 0) for number, solver, pair in numbered]
        results = self._run(phase, requests)
        self._shared.forget()
        rows = [result.latents.detach().float().flatten().cpu() for result in results]
        self._most_values = max(self._most_values, *map(len, rows))
        padded = torch.stack([pad(row, (0, self._most_values - len(row))) for row in rows])
        latents = padded.reshape(len(pairs), len(solvers), -1).transpose(0, 1)
        return torch.where(latents.isfinite(), latents, torch.inf)

    def _run(self, phase: str, requests: Sequence[Request]) -> list[Result]:
        def watch() -> bool:
            shared = self._shared
            done = shared.num_asked
            self._done[phase] += done - self._done.total()
            phases = {name: (self._done[name], max(total, self._done[name])) for name, total in self._planned.items()}
            total = max(done, sum(self._planned.values()))
            self._on_progress(Progress(phase, done, total, phases, shared.num_rows, shared.num_calls))
            return self._is_cancelled()

        return self._shared.run(requests, watch)

    def _request(self, solver: Solver, pair: Pair, *, is_remembered: bool = False) -> Request:
        call = {**self._call, **pair.sizes, "num_inference_steps": solver.num_steps}
        call["generator"] = torch.Generator().manual_seed(pair.seed)
        if pair.guidance_scale is not None:
            call["guidance_scale"] = pair.guidance_scale
        if pair.prompt is not None:
            call["prompt"] = pair.prompt
        return Request(call, solver.scheduler(), is_remembered)
