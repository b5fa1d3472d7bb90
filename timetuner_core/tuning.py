"""Learning `t_ratios`, and the grid, with the network frozen: step by step, and end to end.

Every random draw is keyed by (seed, step, iteration), so a run that is stopped at any iteration and resumed
from its `TuningState` gives the same numbers as an unbroken one, and a step gives the same ratio whether it
is tuned alone or in one batch with others.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timetuner_core.gauss_newton import MEMORY, MIN_BATCHES, GaussNewton, batches_at_once
from timetuner_core.model_wrapper import GuidedModel
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers import (
    Past,
    SamplerStep,
    StepFn,
    adds_noise,
    history_length,
    remember,
    sample,
    scaled,
    with_history,
)

TuneType = Literal["sequential", "parallel"]
StepObjective = Literal["next_eps", "teacher_step"]
Optimizer = Literal["gauss_newton", "adam"]
Parameters = Literal["t_ratios", "timesteps", "both"]


@dataclass(frozen=True)
class TuningProblem:
    """A sampler on a grid, and the population its ratios are tuned on.

    Attributes:
        timesteps: `(num_steps + 1,)`, float64, falling.
        population: what batches are drawn from, with replacement: data x0 for `tune_next_eps`, initial
            noise x_T for `tune_end_to_end`; `(P, ...)`. condition: `(P, ...)` or None.
        step_kwargs: handed to every `step_fn` call (eta, uncond_condition, ...).
    """

    model_fn: GuidedModel
    noise_schedule: NoiseSchedule
    step_fn: StepFn
    timesteps: Tensor
    population: Tensor
    condition: Tensor | None = None
    batch_size: int = 16
    seed: int = 0
    step_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        return len(self.timesteps) - 1

    @property
    def adds_noise(self) -> bool:
        return adds_noise(self.step_fn, self.step_kwargs.get("eta", 0))

    def ratio_bounds(self, timesteps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Per step of a grid, the problem's own if none is given, the least and greatest ratio that keep
        conditioning within `[t_min, T]`, wherever from t to s the step calls the network."""
        timesteps = self.timesteps if timesteps is None else timesteps
        t, s = timesteps[:-1], timesteps[1:]
        calls_on_the_way = isinstance(self.step_fn, SamplerStep) and self.step_fn.sampler.calls_per_step > 1
        lowest = torch.where(s > 0, s, t) if calls_on_the_way else t
        floor = lowest.clamp(max=self.noise_schedule.t_min)
        return floor / lowest, self.noise_schedule.T / t


@dataclass(frozen=True)
class Carried:
    """The population on its way: x_t `(P, ...)`, and the earlier steps that a multistep sampler remembers."""

    x_t: Tensor
    history: tuple[Past, ...] = ()

    def rows(self, index: Tensor) -> "Carried":
        return Carried(self.x_t[index], tuple(Past(p.t, p.x[index], p.x0[index]) for p in self.history))


@dataclass
class TuningState:
    """Progress of a run, all that resuming needs: float64 tensors on the CPU, one row per step.

    Attributes:
        timesteps: `(num_steps + 1,)`, which only tuners that move the grid change. t_ratios: `(num_steps,)`.
        iterations: how many each step has had; done: whether it needs no more; `(num_steps,)`.
        memory: the optimiser's, `(num_steps, MEMORY)`.
        loss: the last iteration's; initial_loss: the first's, at `r = 1`; NaN before a step starts; `(num_steps,)`.
    """

    t_ratios: Tensor
    timesteps: Tensor
    iterations: Tensor
    memory: Tensor
    loss: Tensor
    initial_loss: Tensor
    done: Tensor

    @classmethod
    def start(cls, timesteps: Tensor) -> "TuningState":
        """Nothing tuned yet, on a grid `(num_steps + 1,)`."""
        ones = torch.ones(len(timesteps) - 1, dtype=torch.float64)
        zeros, nans = torch.zeros_like(ones), torch.full_like(ones, torch.nan)
        memory = ones.new_zeros(len(ones), MEMORY)
        done = torch.zeros(len(ones), dtype=torch.bool)
        return cls(ones, timesteps.double().cpu().clone(), zeros, memory, nans, nans.clone(), done)

    def note(self, steps: list[int], loss: Tensor, iterations: int = 1) -> None:
        """So many more iterations on `steps`, with these losses."""
        first = [i for i in steps if self.iterations[i] == 0]
        self.iterations[steps] += iterations
        self.loss[steps] = loss.detach().double().cpu()
        self.initial_loss[first] = self.loss[first]


def tune_per_step(
    problem: TuningProblem,
    state: TuningState,
    objective: StepObjective = "next_eps",
    tune_type: TuneType = "sequential",
    optimizer: Optimizer = "gauss_newton",
    *,
    lr: float = 2e-3,
    total_iters: int = 500,
    tolerance: float = 2e-3,
    substeps: int = 8,
    steps: list[int] | None = None,
) -> Iterator[TuningState]:
    """One ratio per step, each by its own objective: the least batch mean of a squared residual.

    - `next_eps`, the published one (TimeTuner, Xia et al., CVPR 2024): `eps(x_t, t) - eps(x_s(r), s)`; the last step
      keeps `r = 1`.
    - `teacher_step`: `x_s(r) - x_s*`, where the same sampler reaches x_s* from the same x_t in `substeps` steps.

    `parallel` draws `x_t = alpha_t x0 + sigma_t z` and tunes all steps in one batch. `sequential` tunes step after
    step on a population of `x_t` carried forward by the steps already tuned, so its cost is linear in the number of
    steps.

    Args:
        optimizer: `adam`, as published, takes `total_iters` iterations per step at `lr`. `gauss_newton` stops when the
            ratio's standard error is below `tolerance`, or after `total_iters` batches.
        steps: for `parallel`, only these.

    Yields:
        `state`, updated in place, after each iteration.

    Raises:
        ValueError: an unknown name, `parallel` for a multistep sampler, whose steps need those before, `teacher_step`
            for a sampler that adds noise, or a number below its minimum.
    """
    _check_per_step(problem, objective, tune_type, optimizer)
    _check_numbers(problem, lr=lr, total_iters=total_iters, tolerance=tolerance, substeps=substeps)
    num_tuned = problem.num_steps - (objective == "next_eps")
    state.done[num_tuned:] = True
    wanted = range(num_tuned) if steps is None else sorted(set(steps) & set(range(num_tuned)))

    def run(steps: list[int], carried: Carried | None) -> Iterator[TuningState]:
        residuals = StepResiduals(problem, objective, substeps, carried)
        if optimizer == "adam":
            return _adam(problem, state, steps, lr, total_iters, residuals)
        return _gauss_newton(problem, state, steps, tolerance, total_iters, residuals)

    if tune_type == "parallel":
        yield from run(list(wanted), None)
        return
    z = torch.randn(problem.population.shape, generator=_generator(problem.seed, 0, 0))
    carried = Carried(_diffuse(problem, problem.population, z.to(problem.population), problem.timesteps[0]))
    for i in range(num_tuned):
        yield from run([i], carried)
        if i + 1 < num_tuned:
            carried = _carry_forward(problem, carried, i, state.t_ratios[i])


def tune_end_to_end(
    problem: TuningProblem,
    state: TuningState,
    teacher_timesteps: Tensor,
    parameters: Parameters = "t_ratios",
    *,
    lr: float = 1e-2,
    total_iters: int = 100,
    starts: Sequence[Tensor] = (),
    target: Tensor | None = None,
    recompute: bool = True,
) -> Iterator[TuningState]:
    """All steps together, by Adam with `lr` falling to 0, on the batch mean of `|| x0(r) - x0* ||`: the sampler's end
    result against that of a teacher, the same sampler with `r = 1` on a finer grid. The norm is not squared: squared,
    the few samples that end in another mode would decide alone.

    `parameters` are the `t_ratios`, the `timesteps` between the first and the last (as LD3 does, Tong et al. 2025; here
    by the logarithms of their distances, which keeps their order), or `both`.

    `starts` are grids to begin with, of the problem's own ends: the one whose untuned samples are closest to the
    teacher's, or the problem's own if there are none.

    Needs no data: the population is initial noise.

    Args:
        target: the teacher's samples of the population, `(P, ...)`, if they are there already.
        recompute: steps in the backward pass, so that memory does not grow with their number; else they are remembered,
            which takes a third less time.

    Yields:
        `state`, updated in place, after each iteration; before the first, unchanged, as the teacher goes on.

    Raises:
        ValueError: unknown `parameters`, a sampler that adds noise (there is no end result to match), or a number
            below its minimum.
    """
    if parameters not in get_args(Parameters):
        raise ValueError(f"parameters is {parameters!r}; accepted: {', '.join(get_args(Parameters))}")
    if problem.adds_noise:
        raise ValueError("the sampler adds noise; accepted, to be tuned end to end: a deterministic one, with eta 0")
    _check_numbers(problem, lr=lr, total_iters=total_iters)
    if bool((state.iterations >= total_iters).all()):
        return
    if target is None:
        parts = []
        for rows in whole_batches(problem):
            parts.append(_sample(problem, rows, teacher_timesteps, torch.ones(len(teacher_timesteps) - 1)))
            yield state
        target = torch.cat(parts)[: len(problem.population)]
    taught = target
    if starts and not bool(state.iterations.any()):
        state.timesteps = min(starts, key=lambda grid: _mean_error(problem, grid, taught)).double().cpu().clone()
        yield state

    step_fn = RecomputedStep(problem.step_fn) if recompute else problem.step_fn

    def loss(timesteps: Tensor, ratios: Tensor, iteration: int) -> Tensor:
        index = _draw_index(problem, _generator(problem.seed, 0, iteration))
        condition = None if problem.condition is None else problem.condition[index]
        kwargs = _step_kwargs(problem, condition, None)
        x0 = sample(step_fn, problem.population[index], timesteps, ratios, **kwargs)
        distances: Tensor = torch.linalg.vector_norm((x0 - taught[index]).flatten(1), dim=1)
        return distances.mean()

    yield from _adam_end_to_end(problem, state, parameters, lr, total_iters, loss)


@dataclass(frozen=True)
class RecomputedStep:
    """A step function whose backward pass computes the step again instead of remembering it."""

    step_fn: StepFn

    @property
    def history_length(self) -> int:
        return history_length(self.step_fn)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = checkpoint(
            self.step_fn, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )
        return result


def _check_per_step(problem: TuningProblem, objective: str, tune_type: str, optimizer: str) -> None:
    names = {"objective": (objective, StepObjective), "tune_type": (tune_type, TuneType)}
    for name, (value, accepted) in (names | {"optimizer": (optimizer, Optimizer)}).items():
        if value not in get_args(accepted):
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(get_args(accepted))}")
    if tune_type == "parallel" and history_length(problem.step_fn):
        raise ValueError("tune_type is 'parallel'; accepted for a multistep sampler: 'sequential'")
    if objective == "teacher_step" and problem.adds_noise:
        raise ValueError("objective is 'teacher_step'; accepted for a sampler that adds noise: 'next_eps'")


def _check_numbers(problem: TuningProblem, **numbers: float) -> None:
    for name, value in (("batch_size", problem.batch_size), *numbers.items()):
        at_least_one = isinstance(value, int) and name != "lr"
        if at_least_one and value < 1:
            raise ValueError(f"{name} is {value}; accepted: 1 or more")
        if not value > 0:
            raise ValueError(f"{name} is {value}; accepted: above 0")


def _adam(
    problem: TuningProblem,
    state: TuningState,
    steps: list[int],
    lr: float,
    total_iters: int,
    residuals: "StepResiduals",
) -> Iterator[TuningState]:
    """Adam on the ratios of `steps` at once, from where `state` is. Elementwise, so a step's path does not depend
    on which others are tuned with it."""
    done = int(state.iterations[steps].min()) if steps else total_iters
    device = problem.population.device
    lower, upper = (bound[steps].to(device) for bound in problem.ratio_bounds())
    ratios = state.t_ratios[steps].to(device).requires_grad_()
    optimizer, moments = _adam_optimizer([ratios], [state.memory[steps, :2]], lr, done)
    for iteration in range(done, total_iters):
        losses = residuals.draw([(i, iteration) for i in steps]).losses(ratios)
        (ratios.grad,) = torch.autograd.grad(losses.sum(), ratios)  # of nothing else: the network is not ours
        optimizer.step()
        with torch.no_grad():
            ratios.copy_(ratios.clamp(lower, upper))
        state.t_ratios[steps] = ratios.detach().cpu()
        state.memory[steps, :2] = moments()[0]
        state.note(steps, losses)
        state.done[steps] = iteration + 1 >= total_iters
        yield state


def _adam_end_to_end(
    problem: TuningProblem,
    state: TuningState,
    parameters: Parameters,
    lr: float,
    total_iters: int,
    loss_of: Callable[[Tensor, Tensor, int], Tensor],
) -> Iterator[TuningState]:
    """Adam on ratios and grid, from where `state` is."""
    done = int(state.iterations.min())
    device = problem.population.device
    ratios = state.t_ratios.to(device).requires_grad_(parameters != "timesteps")
    log_steps = _log_steps(state.timesteps).to(device).requires_grad_(parameters != "t_ratios")
    tuned = [tensor for tensor in (ratios, log_steps) if tensor.requires_grad]
    columns = [slice(0, 2), slice(2, 4)][: len(tuned)]
    optimizer, moments = _adam_optimizer(tuned, [state.memory[:, c] for c in columns], lr, done)
    for iteration in range(done, total_iters):
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / total_iters)
        timesteps = _timesteps(problem.timesteps, log_steps) if log_steps.requires_grad else state.timesteps
        loss = loss_of(timesteps, ratios, iteration)
        for tensor, gradient in zip(tuned, torch.autograd.grad(loss, tuned), strict=True):
            tensor.grad = gradient
        optimizer.step()
        with torch.no_grad():
            if log_steps.requires_grad:
                state.timesteps = _timesteps(problem.timesteps, log_steps).cpu()
                log_steps.copy_(_log_steps(state.timesteps))  # as a resumed run would find them
            lower, upper = (bound.to(device) for bound in problem.ratio_bounds(state.timesteps))
            if ratios.requires_grad:
                ratios.copy_(ratios.clamp(lower, upper))
                state.t_ratios = ratios.detach().cpu().clone()
        for c, values in zip(columns, moments(), strict=True):
            state.memory[:, c] = values
        state.note(list(range(problem.num_steps)), loss.expand(problem.num_steps) / problem.num_steps)
        state.done[:] = iteration + 1 >= total_iters
        yield state


def _adam_optimizer(
    tensors: list[Tensor], memories: list[Tensor], lr: float, done: int
) -> tuple[torch.optim.Adam, Callable[[], list[Tensor]]]:
    """Adam as it was after `done` iterations, from its two moments of each tensor, `(num_steps, 2)`; and a
    function that gives these moments as they are now."""
    optimizer = torch.optim.Adam(tensors, lr=lr)
    for tensor, memory in zip(tensors, memories, strict=True):
        exp_avg, exp_avg_sq = memory.to(tensor).clone().unbind(dim=1)
        optimizer.state[tensor] = {
            "step": torch.tensor(float(done)),
            "exp_avg": exp_avg.contiguous(),
            "exp_avg_sq": exp_avg_sq.contiguous(),
        }

    def moments() -> list[Tensor]:
        states = [optimizer.state[tensor] for tensor in tensors]
        return [torch.stack([s["exp_avg"], s["exp_avg_sq"]], dim=1).cpu() for s in states]

    return optimizer, moments


def _log_steps(timesteps: Tensor) -> Tensor:
    """The logarithm of each step's share of the whole, `(num_steps,)`."""
    steps = timesteps[:-1] - timesteps[1:]
    return torch.log(steps / steps.sum())


def _timesteps(timesteps: Tensor, log_steps: Tensor) -> Tensor:
    """The grid with steps in the ratios of `exp(log_steps)`; its ends exactly those of `timesteps`."""
    first, last = timesteps[:1].to(log_steps), timesteps[-1:].to(log_steps)
    inner = first + (last - first) * torch.softmax(log_steps, 0).cumsum(0)[:-1]
    return torch.cat([first, inner, last])


def _gauss_newton(
    problem: TuningProblem,
    state: TuningState,
    steps: list[int],
    tolerance: float,
    total_iters: int,
    residuals: "StepResiduals",
) -> Iterator[TuningState]:
    """`GaussNewton` on the ratios of `steps` at once, from where `state` is; steps that are done drop out, and those
    that are not take their place in the network's batch: the more batches a step has had, the more it gets at once."""
    lower, upper = problem.ratio_bounds()
    while open_steps := [i for i in steps if not state.done[i]]:
        done = int(state.iterations[open_steps[0]])  # the same for all: they started together
        batches = range(done, min(done + batches_at_once(done), total_iters))
        draws = [(i, iteration) for iteration in batches for i in open_steps]
        estimate = GaussNewton(state.memory[open_steps], lower[open_steps], upper[open_steps], done)
        before = state.t_ratios[open_steps]
        low, high = estimate.around(before)
        losses = torch.zeros_like(before)
        for start in range(0, len(draws), len(steps)):
            drawn = draws[start : start + len(steps)]
            of = torch.tensor([open_steps.index(i) for i, _ in drawn])
            with torch.no_grad():
                batch = residuals.draw(drawn)
                at_low, at_high = (batch.residuals(r[of]).flatten(2).double().cpu() for r in (low, high))
            losses.index_add_(0, of, estimate.add(of, low, high, at_low, at_high))
        state.t_ratios[open_steps] = after = estimate.step(before)
        state.memory[open_steps] = estimate.memory
        state.note(open_steps, losses / len(batches), len(batches))
        settled = estimate.settled(before, after, tolerance)
        iterations = state.iterations[open_steps]
        state.done[open_steps] = (settled & (iterations >= MIN_BATCHES)) | (iterations >= total_iters)
        yield state


@dataclass(frozen=True)
class StepResiduals:
    """The residuals of the per-step objectives, drawn batch by batch."""

    problem: TuningProblem
    objective: StepObjective
    substeps: int
    carried: Carried | None

    def draw(self, drawn: list[tuple[int, int]]) -> "ResidualBatch":
        """`batch_size` samples for each pair of a step and an iteration, in one network batch, and the targets of
        their residuals."""
        problem = self.problem
        batches = [_draw(problem, i, self.carried, iteration) for i, iteration in drawn]
        steps = [i for i, _ in drawn]
        x_t, condition = _cat([b.x_t for b in batches]), _cat([b.condition for b in batches])
        noise = _cat([b.noise for b in batches])
        assert x_t is not None
        history = batches[0].history  # multistep samplers are tuned one step at a time
        rows = torch.arange(len(steps)).repeat_interleave(problem.batch_size)
        grid = problem.timesteps[torch.tensor(steps)], problem.timesteps[torch.tensor(steps) + 1]
        t, s = (times[rows].to(x_t.device) for times in grid)
        batch = ResidualBatch(self, x_t, t, s, rows.to(x_t.device), condition, noise, history)
        with torch.no_grad():
            return dataclasses.replace(batch, target=batch.targets())


@dataclass(frozen=True)
class ResidualBatch:
    """Some batches in one: `rows` `(B,)` says to which of them a sample belongs."""

    of: StepResiduals
    x_t: Tensor
    t: Tensor
    s: Tensor
    rows: Tensor
    condition: Tensor | None
    noise: Tensor | None
    history: tuple[Past, ...]
    target: Tensor | None = None

    def targets(self) -> Tensor:
        if self.of.objective == "next_eps":
            return self._eps(self.x_t, self.t)
        problem, x = self.of.problem, self.x_t
        kwargs = _step_kwargs(problem, self.condition, self.noise)
        part = torch.arange(self.of.substeps + 1, dtype=torch.float64, device=x.device) / self.of.substeps
        times = torch.lerp(self.t[None], self.s[None], part[:, None])  # (substeps + 1, B)
        return sample(problem.step_fn, x, times, torch.ones(self.of.substeps), **kwargs)

    def residuals(self, ratios: Tensor) -> Tensor:
        """At one ratio per batch, `(len(ratios), batch_size, ...)`."""
        problem = self.of.problem
        kwargs = _step_kwargs(problem, self.condition, self.noise) | with_history(problem.step_fn, self.history)
        t_ratio = ratios.to(self.x_t.device)[self.rows]
        x_s, _ = problem.step_fn(self.x_t, self.t, self.s, t_ratio=t_ratio, **kwargs)
        value = self._eps(x_s, self.s) if self.of.objective == "next_eps" else x_s
        assert self.target is not None
        return (self.target - value).reshape(len(ratios), problem.batch_size, *value.shape[1:])

    def losses(self, ratios: Tensor) -> Tensor:
        """The mean squared residual of each batch, `(len(ratios),)`."""
        return self.residuals(ratios).flatten(2).square().sum(dim=2).mean(dim=1)

    def _eps(self, x: Tensor, t: Tensor) -> Tensor:
        problem = self.of.problem
        guidance = {name: value for name, value in problem.step_kwargs.items() if name == "uncond_condition"}
        return problem.model_fn(x, t, self.condition, **guidance)


def whole_batches(problem: TuningProblem, size: int | None = None) -> Iterator[Tensor]:
    """The population's first `size` rows, default all, by batch, the last filled up from the start: a condition among
    `step_kwargs` may have as many rows as a batch."""
    size = len(problem.population) if size is None else size
    for start in range(0, size, problem.batch_size):
        yield (torch.arange(start, start + problem.batch_size) % size).to(problem.population.device)


@torch.no_grad()
def _carry_forward(problem: TuningProblem, carried: Carried, i: int, t_ratio: Tensor) -> Carried:
    """The population after step `i`, in chunks of the batch size."""
    t, s = problem.timesteps[i], problem.timesteps[i + 1]
    remembers = history_length(problem.step_fn) > 0
    x_s = torch.empty_like(carried.x_t) if remembers else carried.x_t  # in place, where nothing is remembered
    x0 = torch.empty_like(carried.x_t) if remembers else None
    for rows in whole_batches(problem):
        batch = carried.rows(rows)
        condition = None if problem.condition is None else problem.condition[rows]
        noise = _noise(problem, batch.x_t, _generator(problem.seed, i + 1, -1 - int(rows[0])))
        kwargs = _step_kwargs(problem, condition, noise) | with_history(problem.step_fn, batch.history)
        result = problem.step_fn(batch.x_t, t, s, t_ratio=t_ratio, **kwargs)
        size = min(len(rows), len(x_s) - int(rows[0]))  # the last batch is filled up with rows that had their turn
        x_s[rows[:size]] = result[0][:size]
        if x0 is not None:
            x0[rows[:size]] = result[1][:size]
    if x0 is None:
        return Carried(x_s)
    return Carried(x_s, remember(problem.step_fn, carried.history, Past(t, carried.x_t, x0)))


@torch.no_grad()
def _sample(problem: TuningProblem, rows: Tensor, timesteps: Tensor, t_ratios: Tensor) -> Tensor:
    """x0 from some rows of a population of initial noise."""
    condition = None if problem.condition is None else problem.condition[rows]
    kwargs = _step_kwargs(problem, condition, None)
    return sample(problem.step_fn, problem.population[rows], timesteps, t_ratios, **kwargs)


def _mean_error(problem: TuningProblem, timesteps: Tensor, target: Tensor) -> float:
    """How far untuned samples on a grid are from `target` `(P, ...)`, from the whole population."""
    ones = torch.ones(len(timesteps) - 1)
    x0 = torch.cat([_sample(problem, rows, timesteps, ones) for rows in whole_batches(problem)])[: len(target)]
    return float(torch.linalg.vector_norm((x0 - target).flatten(1), dim=1).mean())


@dataclass(frozen=True)
class Batch:
    """What one iteration on one step sees."""

    x_t: Tensor
    condition: Tensor | None
    noise: Tensor | None
    history: tuple[Past, ...]


def _draw(problem: TuningProblem, i: int, carried: Carried | None, iteration: int) -> Batch:
    """One batch of step `i`: x_t from the carried population, or else from data and fresh noise."""
    generator = _generator(problem.seed, i + 1, iteration)
    index = _draw_index(problem, generator)
    condition = None if problem.condition is None else problem.condition[index]
    if carried is None:
        x0 = problem.population[index]
        z = torch.randn(x0.shape, generator=generator).to(x0)
        rows = Carried(_diffuse(problem, x0, z, problem.timesteps[i]))
    else:
        rows = carried.rows(index)
    return Batch(rows.x_t, condition, _noise(problem, rows.x_t, generator), rows.history)


def _draw_index(problem: TuningProblem, generator: torch.Generator) -> Tensor:
    index = torch.randint(len(problem.population), (problem.batch_size,), generator=generator)
    return index.to(problem.population.device)


def _diffuse(problem: TuningProblem, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    schedule = problem.noise_schedule
    return scaled(schedule.marginal_alpha(t), x0) + scaled(schedule.marginal_std(t), z)


def _noise(problem: TuningProblem, x: Tensor, generator: torch.Generator) -> Tensor | None:
    """What a stochastic step adds; None for a deterministic one."""
    if not problem.adds_noise:
        return None
    return torch.randn(x.shape, generator=generator).to(x)


def _step_kwargs(problem: TuningProblem, condition: Tensor | None, noise: Tensor | None) -> dict[str, Any]:
    """Only what there is: a user's own `step_fn` need not know of noise or conditions."""
    given = {"condition": condition, "noise": noise}
    return {**problem.step_kwargs, **{name: value for name, value in given.items() if value is not None}}


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def _generator(seed: int, step: int, iteration: int) -> torch.Generator:
    """A CPU generator keyed by its three arguments."""
    key = (seed * 1_000_003 + step) * 1_000_003 + iteration
    return torch.Generator().manual_seed(key % 2**63)
