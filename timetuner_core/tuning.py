"""Learning `t_ratios` with the network frozen: the published per-step objective, and end to end.

Every random draw is keyed by (seed, step, iteration), so a run that is stopped at any iteration and resumed
from its `TuningState` gives the same numbers as an unbroken one, and a step gives the same ratio whether it
is tuned alone or in one batch with others.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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

    def ratio_bounds(self) -> tuple[Tensor, Tensor]:
        """Per step, the least and greatest ratio that keep conditioning within `[t_min, T]`, wherever from t to s
        the step calls the network."""
        t, s = self.timesteps[:-1], self.timesteps[1:]
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
    """Progress of a run, all that resuming needs: per step, `(num_steps,)` float64 tensors on the CPU.

    `loss` is the last iteration's, `initial_loss` that of the first, at `r = 1`; NaN before a step starts.
    """

    t_ratios: Tensor
    iterations: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    loss: Tensor
    initial_loss: Tensor

    @classmethod
    def start(cls, num_steps: int) -> "TuningState":
        ones = torch.ones(num_steps, dtype=torch.float64)
        zeros, nans = torch.zeros_like(ones), torch.full_like(ones, torch.nan)
        return cls(ones, zeros.clone(), zeros.clone(), zeros.clone(), nans.clone(), nans.clone())


def tune_next_eps(
    problem: TuningProblem,
    state: TuningState,
    tune_type: TuneType = "sequential",
    lr: float = 2e-3,
    total_iters: int = 500,
) -> Iterator[TuningState]:
    """The published procedure (TimeTuner, CVPR 2024): per step, Adam on the batch mean of
    `|| eps(x_t, t) - eps(x_s(r), s) ||^2`; the last step keeps `r = 1`.

    `parallel` draws `x_t = alpha_t x0 + sigma_t z` and tunes all steps in one batch. `sequential` tunes step
    after step on a population of `x_t` carried forward by the steps already tuned, so its cost is linear
    in the number of steps.

    Yields:
        `state`, updated in place, after each iteration.

    Raises:
        ValueError: unknown `tune_type`, `parallel` for a multistep sampler, whose steps need those before, or a
            number below its minimum.
    """
    if tune_type not in get_args(TuneType):
        raise ValueError(f"tune_type is {tune_type!r}; accepted: {', '.join(get_args(TuneType))}")
    if tune_type == "parallel" and history_length(problem.step_fn):
        raise ValueError("tune_type is 'parallel'; accepted for a multistep sampler: 'sequential'")
    _check_numbers(problem, lr, total_iters)
    num_tuned = problem.num_steps - 1
    if tune_type == "parallel":
        steps = list(range(num_tuned))
        yield from _adam(problem, state, steps, lr, total_iters, _next_eps_losses(problem, steps, None))
        return
    z = torch.randn(problem.population.shape, generator=_generator(problem.seed, 0, 0))
    carried = Carried(_diffuse(problem, problem.population, z.to(problem.population), problem.timesteps[0]))
    for i in range(num_tuned):
        yield from _adam(problem, state, [i], lr, total_iters, _next_eps_losses(problem, [i], carried))
        if i + 1 < num_tuned:
            carried = _carry_forward(problem, carried, i, state.t_ratios[i])


def tune_end_to_end(
    problem: TuningProblem,
    state: TuningState,
    teacher_timesteps: Tensor,
    lr: float = 1e-2,
    total_iters: int = 100,
) -> Iterator[TuningState]:
    """All ratios together, by Adam with `lr` falling to 0, on the batch mean of `|| x0(r) - x0* ||`:
    the sampler's end result against that of a teacher, the same sampler with `r = 1` on a finer grid.
    The norm is not squared: squared, the few samples that end in another mode would decide alone.

    Needs no data: the population is initial noise. Steps are recomputed in the backward pass, so memory does
    not grow with the number of steps.

    Yields:
        `state`, updated in place, after each iteration; before the first, unchanged, as the teacher goes on.

    Raises:
        ValueError: a sampler that adds noise (there is no end result to match), or a number below its minimum.
    """
    if problem.adds_noise:
        raise ValueError("the sampler adds noise; accepted, to be tuned end to end: a deterministic one, with eta 0")
    _check_numbers(problem, lr, total_iters)
    if bool((state.iterations >= total_iters).all()):
        return
    targets = []
    for rows in _whole_batches(problem):
        targets.append(_sample(problem, rows, teacher_timesteps, torch.ones(len(teacher_timesteps) - 1)))
        yield state
    target = torch.cat(targets)[: len(problem.population)]

    def losses(ratios: Tensor, iteration: int) -> Tensor:
        index = _draw_index(problem, _generator(problem.seed, 0, iteration))
        condition = None if problem.condition is None else problem.condition[index]
        kwargs = _step_kwargs(problem, condition, None)

        x0 = sample(RecomputedStep(problem.step_fn), problem.population[index], problem.timesteps, ratios, **kwargs)
        loss: Tensor = torch.linalg.vector_norm((x0 - target[index]).flatten(1), dim=1).mean()
        return loss.expand(problem.num_steps) / problem.num_steps

    steps = list(range(problem.num_steps))
    yield from _adam(problem, state, steps, lr, total_iters, losses, decay=True)


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


def _check_numbers(problem: TuningProblem, lr: float, total_iters: int) -> None:
    for name, value in (("batch_size", problem.batch_size), ("total_iters", total_iters)):
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: 1 or more")
    if not lr > 0:
        raise ValueError(f"lr is {lr}; accepted: above 0")


def _adam(
    problem: TuningProblem,
    state: TuningState,
    steps: list[int],
    lr: float,
    total_iters: int,
    losses_of: Callable[[Tensor, int], Tensor],
    decay: bool = False,
) -> Iterator[TuningState]:
    """Adam on the ratios of `steps` at once, from where `state` is; `losses_of(ratios, iteration)` gives one
    loss per step. Elementwise, so a step's path does not depend on which others are tuned with it."""
    done = int(state.iterations[steps].min()) if steps else total_iters
    device = problem.population.device
    lower, upper = (bound[steps].to(device) for bound in problem.ratio_bounds())
    ratios = state.t_ratios[steps].to(device).requires_grad_()
    optimizer = torch.optim.Adam([ratios], lr=lr)
    moments = {
        "step": torch.tensor(float(done)),
        "exp_avg": state.exp_avg[steps].to(device),
        "exp_avg_sq": state.exp_avg_sq[steps].to(device),
    }
    optimizer.state[ratios] = moments
    for iteration in range(done, total_iters):
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / total_iters) if decay else lr
        losses = losses_of(ratios, iteration)
        (ratios.grad,) = torch.autograd.grad(losses.sum(), ratios)  # of nothing else: the network is not ours
        optimizer.step()
        with torch.no_grad():
            ratios.copy_(ratios.clamp(lower, upper))
        state.t_ratios[steps] = ratios.detach().cpu()
        state.exp_avg[steps] = moments["exp_avg"].cpu()
        state.exp_avg_sq[steps] = moments["exp_avg_sq"].cpu()
        state.iterations[steps] = iteration + 1.0
        state.loss[steps] = losses.detach().double().cpu()
        if iteration == 0:
            state.initial_loss[steps] = state.loss[steps]
        yield state


def _next_eps_losses(
    problem: TuningProblem, steps: list[int], carried: Carried | None
) -> Callable[[Tensor, int], Tensor]:
    """The published objective of each of `steps`, on `batch_size` samples per step in one network batch."""
    index = torch.tensor(steps, dtype=torch.long)
    guidance = {name: value for name, value in problem.step_kwargs.items() if name == "uncond_condition"}

    def per_sample(per_step: Tensor) -> Tensor:
        return per_step.to(problem.population.device).repeat_interleave(problem.batch_size)

    t, s = per_sample(problem.timesteps[index]), per_sample(problem.timesteps[index + 1])

    def losses(ratios: Tensor, iteration: int) -> Tensor:
        batches = [_draw(problem, i, carried, iteration) for i in steps]
        x_t, condition = _cat([b.x_t for b in batches]), _cat([b.condition for b in batches])
        noise = _cat([b.noise for b in batches])
        assert x_t is not None
        history = batches[0].history  # multistep samplers are tuned one step at a time
        with torch.no_grad():
            target = problem.model_fn(x_t, t, condition, **guidance)
        kwargs = _step_kwargs(problem, condition, noise) | with_history(problem.step_fn, history)
        x_s, _ = problem.step_fn(x_t, t, s, t_ratio=per_sample(ratios), **kwargs)
        error = (target - problem.model_fn(x_s, s, condition, **guidance)).square().flatten(1).sum(dim=1)
        return error.reshape(len(steps), problem.batch_size).mean(dim=1)

    return losses


def _whole_batches(problem: TuningProblem) -> Iterator[Tensor]:
    """The population's rows by batch, the last filled up from the start: a condition among `step_kwargs` may have
    as many rows as a batch."""
    size = len(problem.population)
    for start in range(0, size, problem.batch_size):
        yield (torch.arange(start, start + problem.batch_size) % size).to(problem.population.device)


@torch.no_grad()
def _carry_forward(problem: TuningProblem, carried: Carried, i: int, t_ratio: Tensor) -> Carried:
    """The population after step `i`, in chunks of the batch size."""
    t, s = problem.timesteps[i], problem.timesteps[i + 1]
    x_s, x0 = [], []
    for rows in _whole_batches(problem):
        batch = carried.rows(rows)
        condition = None if problem.condition is None else problem.condition[rows]
        noise = _noise(problem, batch.x_t, _generator(problem.seed, i + 1, -1 - int(rows[0])))
        kwargs = _step_kwargs(problem, condition, noise) | with_history(problem.step_fn, batch.history)
        result = problem.step_fn(batch.x_t, t, s, t_ratio=t_ratio, **kwargs)
        x_s.append(result[0])
        x0.append(result[1])
    size = len(carried.x_t)
    past = Past(t, carried.x_t, torch.cat(x0)[:size])
    return Carried(torch.cat(x_s)[:size], remember(problem.step_fn, carried.history, past))


@torch.no_grad()
def _sample(problem: TuningProblem, rows: Tensor, timesteps: Tensor, t_ratios: Tensor) -> Tensor:
    """x0 from some rows of a population of initial noise."""
    condition = None if problem.condition is None else problem.condition[rows]
    kwargs = _step_kwargs(problem, condition, None)
    return sample(problem.step_fn, problem.population[rows], timesteps, t_ratios, **kwargs)


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
