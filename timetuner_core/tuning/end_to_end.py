"""All steps together, so that the result matches a many-step teacher's."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timetuner_core.guided_model import expand_like
from timetuner_core.samplers import Sampler, StepFn, history_length, sample
from timetuner_core.tuners import MAX_START_SAMPLES, Parameters
from timetuner_core.tuning.adam import resumed_adam
from timetuner_core.tuning.draws import draw_index, keyed_generator
from timetuner_core.tuning.problem import (
    TuningProblem,
    TuningState,
    check_numbers,
    whole_batches,
)


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
    relaxed_start: float = 0.0,
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
        relaxed_start: LD3's relaxation, `c`: a sample's distance is the least from any start within the radius
            `c D / num_steps**2` about its x_T, in x_T's standard deviation, where D is the number of values of a sample
            (see `_relaxed_distances`). LD3's authors take 0.001. 0: each start is x_T itself.

    Yields:
        `state`, updated in place, after each iteration; before the first, unchanged, as the teacher goes on.

    Raises:
        ValueError: unknown `parameters`, a sampler that adds noise (there is no end result to match), or a number
            below its minimum.
    """
    if relaxed_start < 0:
        raise ValueError(f"relaxed_start is {relaxed_start}; accepted: 0 or more")
    if parameters not in get_args(Parameters):
        raise ValueError(f"parameters is {parameters!r}; accepted: {', '.join(get_args(Parameters))}")
    if problem.adds_noise:
        raise ValueError("the sampler adds noise; accepted, to be tuned end to end: a deterministic one, with eta 0")
    check_numbers(problem, lr=lr, total_iters=total_iters)
    if bool((state.iterations >= total_iters).all()):
        return
    taught = yield from teach(problem, state, teacher_timesteps, starts, target)

    std = problem.noise_schedule.starting_std(problem.timesteps[0])
    radius = relaxed_start * problem.population[0].numel() / problem.num_steps**2 * std

    def loss(timesteps: Tensor, ratios: Tensor, iteration: int) -> Tensor:
        index = draw_index(problem, keyed_generator(problem.seed, 0, iteration))
        kwargs = problem.step_kwargs_with(problem.condition_of(index), None)
        guided = problem.step_fn_of(index)
        step_fn = RecomputedStep(guided) if recompute else guided

        def distances(x_T: Tensor) -> Tensor:
            x0 = sample(step_fn, x_T, timesteps, ratios, **kwargs)
            norms: Tensor = torch.linalg.vector_norm((x0 - taught[index]).flatten(1), dim=1)
            return norms

        x_T = problem.population[index]
        return (_relaxed_distances(distances, x_T, radius) if radius else distances(x_T)).mean()

    yield from _adam_end_to_end(problem, state, parameters, lr, total_iters, loss)


def _relaxed_distances(distances: Callable[[Tensor], Tensor], x_T: Tensor, radius: float) -> Tensor:
    """Each sample's distance from its own x_T, or from the start that is `radius` down its gradient, if that is less.

    That start is the best within the ball as far as the distance is linear there. Neither is remembered, so that a
    resumed run and an unbroken one are equal.

    Args:
        distances: from `(B, ...)` to `(B,)`, each sample by itself.
    """
    start = x_T.detach().requires_grad_()
    at_start = distances(start)
    (gradient,) = torch.autograd.grad(at_start.sum(), start, retain_graph=True)
    length = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
    moved = x_T - radius * gradient / expand_like(length, gradient)
    return torch.minimum(at_start, distances(moved))


def teach(
    problem: TuningProblem,
    state: TuningState,
    teacher_timesteps: Tensor,
    starts: Sequence[Tensor],
    target: Tensor | None = None,
) -> Generator[TuningState, None, Tensor]:
    """The teacher's samples of the population, `(P, ...)`, unless they are given as `target`.

    Before the first iteration, `state` gets the one of the `starts` whose untuned samples are closest to them.

    Yields:
        `state`, after each of the teacher's batches and once a start is chosen.
    """
    if target is None:
        parts = []
        for rows in whole_batches(problem):
            parts.append(_sample(problem, rows, teacher_timesteps, torch.ones(len(teacher_timesteps) - 1)))
            yield state
        target = torch.cat(parts)[: len(problem.population)]
    if starts and not bool(state.iterations.any()):
        state.timesteps = best_start(problem, starts, target).double().cpu().clone()
        yield state
    return target


def best_start(problem: TuningProblem, starts: Sequence[Tensor], target: Tensor) -> Tensor:
    """The grid whose untuned samples are closest to the teacher's `target` `(P, ...)`."""
    return starts[0] if len(starts) == 1 else min(starts, key=lambda grid: _mean_error(problem, grid, target))


@dataclass(frozen=True)
class RecomputedStep:
    """A step function whose backward pass computes the step again instead of remembering it."""

    step_fn: StepFn

    @property
    def history_length(self) -> int:
        return history_length(self.step_fn)

    @property
    def sampler(self) -> Sampler | None:
        sampler: Sampler | None = getattr(self.step_fn, "sampler", None)
        return sampler

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = checkpoint(
            self.step_fn, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )
        return result


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
    optimizer, moments = resumed_adam(tuned, [state.memory[:, c] for c in columns], lr, done)
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
                # Go through the saved values, so an unbroken run and a resumed one see the same numbers.
                log_steps.copy_(_log_steps(state.timesteps))
            lower, upper = (bound.to(device) for bound in problem.ratio_bounds(state.timesteps))
            if ratios.requires_grad:
                ratios.copy_(ratios.clamp(lower, upper))
                state.t_ratios = ratios.detach().cpu().clone()
        for c, values in zip(columns, moments(), strict=True):
            state.memory[:, c] = values
        state.note(list(range(problem.num_steps)), loss.expand(problem.num_steps) / problem.num_steps)
        state.done[:] = iteration + 1 >= total_iters
        yield state


def _log_steps(timesteps: Tensor) -> Tensor:
    """The logarithm of each step's share of the whole, `(num_steps,)`."""
    steps = timesteps[:-1] - timesteps[1:]
    return torch.log(steps / steps.sum())


def _timesteps(timesteps: Tensor, log_steps: Tensor) -> Tensor:
    """The grid with steps in the ratios of `exp(log_steps)`; its ends exactly those of `timesteps`."""
    first, last = timesteps[:1].to(log_steps), timesteps[-1:].to(log_steps)
    inner = first + (last - first) * torch.softmax(log_steps, 0).cumsum(0)[:-1]
    return torch.cat([first, inner, last])


@torch.no_grad()
def _sample(problem: TuningProblem, rows: Tensor, timesteps: Tensor, t_ratios: Tensor) -> Tensor:
    """x0 from some rows of a population of initial noise, which is scaled to start from the grid's first time."""
    kwargs = problem.step_kwargs_with(problem.condition_of(rows), None)
    x_T = problem.starting_factor(timesteps[0]) * problem.population[rows]
    return sample(problem.step_fn_of(rows), x_T, timesteps, t_ratios, **kwargs)


def _mean_error(problem: TuningProblem, timesteps: Tensor, target: Tensor) -> float:
    """How far untuned samples on a grid are from `target` `(P, ...)`, from the first `MAX_START_SAMPLES` noises."""
    ones, size = torch.ones(len(timesteps) - 1), min(MAX_START_SAMPLES, len(target))
    x0 = torch.cat([_sample(problem, rows, timesteps, ones) for rows in whole_batches(problem, size)])[:size]
    return float(torch.linalg.vector_norm((x0 - target[:size]).flatten(1), dim=1).mean())
