"""One ratio per step, each by its own objective."""

from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor

from timetuner_core.samplers import history_length
from timetuner_core.tuners import Optimizer, TuneType
from timetuner_core.tuning.adam import resumed_adam
from timetuner_core.tuning.draws import Batch, Carried, carry_forward, draw_batch, first_carried
from timetuner_core.tuning.gauss_newton import MIN_BATCHES, GaussNewton, batches_at_once
from timetuner_core.tuning.objectives import Residual, next_eps_residual, teacher_step_residual
from timetuner_core.tuning.problem import StepObjective, TuningProblem, TuningState, check_numbers

# A function of pairs of a step and an iteration: it draws their batch, and gives its residual.
Draw = Callable[[list[tuple[int, int]]], tuple[Batch, Residual]]


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
    problem.check_one_scale(objective)
    check_numbers(problem, lr=lr, total_iters=total_iters, tolerance=tolerance, substeps=substeps)
    num_tuned = problem.num_steps - (objective == "next_eps")
    state.done[num_tuned:] = True
    wanted = range(num_tuned) if steps is None else sorted(set(steps) & set(range(num_tuned)))

    def run(steps: list[int], carried: Carried | None) -> Iterator[TuningState]:
        def draw(drawn: list[tuple[int, int]]) -> tuple[Batch, Residual]:
            batch = draw_batch(problem, drawn, carried)
            is_published = objective == "next_eps"
            return batch, next_eps_residual(batch) if is_published else teacher_step_residual(batch, substeps)

        if optimizer == "adam":
            return _adam(problem, state, steps, lr, total_iters, draw)
        return _gauss_newton(problem, state, steps, tolerance, total_iters, draw)

    if tune_type == "parallel":
        yield from run(list(wanted), None)
        return
    carried = first_carried(problem)
    for i in range(num_tuned):
        yield from run([i], carried)
        if i + 1 < num_tuned:
            carried = carry_forward(problem, carried, i, state.t_ratios[i])


def _check_per_step(problem: TuningProblem, objective: str, tune_type: str, optimizer: str) -> None:
    names = {"objective": (objective, StepObjective), "tune_type": (tune_type, TuneType)}
    for name, (value, accepted) in (names | {"optimizer": (optimizer, Optimizer)}).items():
        if value not in get_args(accepted):
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(get_args(accepted))}")
    if tune_type == "parallel" and history_length(problem.step_fn):
        raise ValueError("tune_type is 'parallel'; accepted for a multistep sampler: 'sequential'")
    if objective == "teacher_step" and problem.adds_noise:
        raise ValueError("objective is 'teacher_step'; accepted for a sampler that adds noise: 'next_eps'")


def _adam(
    problem: TuningProblem,
    state: TuningState,
    steps: list[int],
    lr: float,
    total_iters: int,
    draw: Draw,
) -> Iterator[TuningState]:
    """Adam on the ratios of `steps` at once, from where `state` is. Elementwise, so a step's path does not depend
    on which others are tuned with it."""
    done = int(state.iterations[steps].min()) if steps else total_iters
    device = problem.population.device
    lower, upper = (bound[steps].to(device) for bound in problem.ratio_bounds())
    ratios = state.t_ratios[steps].to(device).requires_grad_()
    optimizer, moments = resumed_adam([ratios], [state.memory[steps, :2]], lr, done)
    for iteration in range(done, total_iters):
        losses = losses_of(*draw([(i, iteration) for i in steps]), ratios)
        # Differentiate with respect to the ratios only, so that the caller's network gets no `.grad`.
        (ratios.grad,) = torch.autograd.grad(losses.sum(), ratios)
        optimizer.step()
        with torch.no_grad():
            ratios.copy_(ratios.clamp(lower, upper))
        state.t_ratios[steps] = ratios.detach().cpu()
        state.memory[steps, :2] = moments()[0]
        state.note(steps, losses)
        state.done[steps] = iteration + 1 >= total_iters
        yield state


def _gauss_newton(
    problem: TuningProblem,
    state: TuningState,
    steps: list[int],
    tolerance: float,
    total_iters: int,
    draw: Draw,
) -> Iterator[TuningState]:
    """`GaussNewton` on the ratios of `steps` at once, from where `state` is; steps that are done drop out, and those
    that are not take their place in the network's batch: the more batches a step has had, the more it gets at once."""
    lower, upper = problem.ratio_bounds()
    while open_steps := [i for i in steps if not state.done[i]]:
        done = int(state.iterations[open_steps[0]])  # All open steps have had as many: they started together.
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
                batch, residual = draw(drawn)
                at_low, at_high = (residuals_of(batch, residual, r[of]).double().cpu() for r in (low, high))
            losses.index_add_(0, of, estimate.add(of, low, high, at_low, at_high))
        state.t_ratios[open_steps] = after = estimate.step(before)
        state.memory[open_steps] = estimate.memory
        state.note(open_steps, losses / len(batches), len(batches))
        settled = estimate.settled(before, after, tolerance)
        iterations = state.iterations[open_steps]
        state.done[open_steps] = (settled & (iterations >= MIN_BATCHES)) | (iterations >= total_iters)
        yield state


def residuals_of(batch: Batch, residual: Residual, ratios: Tensor) -> Tensor:
    """The residuals at one ratio per drawn step, `(len(ratios), batch_size, D)`."""
    r = ratios.to(batch.x_t.device)[batch.group]
    return residual(r).reshape(len(ratios), batch.problem.batch_size, -1)


def losses_of(batch: Batch, residual: Residual, ratios: Tensor) -> Tensor:
    """The mean squared norm of each drawn step's residuals, `(len(ratios),)`."""
    return residuals_of(batch, residual, ratios).square().sum(dim=2).mean(dim=1)
