"""The whole solver, learned from forward calls of the network alone.

Its time grid, its ratios and the coefficients of its table are changed together, by Gauss-Newton steps with Levenberg's
damping. The Jacobian is made of difference quotients: one more run of the sampler for each number that is learned. Such
a run begins where the number first acts, since all calls before are those of the unchanged solver.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from timetuner_core.guided_model import Prediction
from timetuner_core.samplers import Sampler, SamplerStep
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuning.draws import keyed_generator
from timetuner_core.tuning.end_to_end import best_start, teach
from timetuner_core.tuning.levenberg import (
    FIRST_DAMPING,
    MAX_FRUITLESS,
    Candidate,
    Residuals,
    improve,
    mean_distances,
    quotient_units_of,
)
from timetuner_core.tuning.problem import TuningProblem, TuningState, check_numbers
from timetuner_core.tuning.solver_columns import COMPARED_PER_SAMPLE, NUM_CANDIDATES, samples_held, solver_columns

MAX_VALUES_HELD = 2**24  # The values of samples and predictions that are in memory at once, unless one row has more.


@torch.no_grad()
def tune_solver(
    problem: TuningProblem,
    state: TuningState,
    teacher_timesteps: Tensor,
    *,
    total_iters: int = 10,
    with_ratios: bool = True,
    with_start: bool = True,
    starts: Sequence[Tensor] = (),
    free_starts: Sequence[Tensor] = (),
    target: Tensor | None = None,
) -> Iterator[TuningState]:
    """Learn grid, ratios and coefficients, so that the batch mean of `|| x0 - x0* ||` falls, where x0* is the end
    result of a teacher: the same sampler, untuned, on a finer grid. The norm is not squared, as in
    `tune_end_to_end`, so each sample's squared residual has the weight `1 / || x0 - x0* ||`.

    Each iteration takes the Jacobian on `batch_size` samples of the population, solves for the change under three
    dampings, and keeps the best of the three and of no change, on `2 batch_size` other samples. It ends early after
    some iterations without a better one. There is no backward pass.

    Of a sampler that calls the network several times per step, the table has a row per call: all of these are learned,
    and a ratio and a time per step. The times of calls within a step follow from the grid.

    Args:
        with_ratios: False leaves all ratios at 1: BNS (Shaul et al. 2024) and S4S (Frankel et al. 2025) learn so much.
        with_start: whether the first time is learned, which is a free step from `T` (see `solver_columns`). It stays
            where sampling cannot start later (see `NoiseSchedule.can_start_later`).
        starts, target: those of `tune_end_to_end`. The population is initial noise.
        free_starts: grids with a free first step. The first iteration is made from the best of these, too, and the
            tuner goes on from the better of both results.

    Yields:
        `state`, updated in place, after each iteration; before the first, unchanged, as the teacher goes on.

    Raises:
        ValueError: a sampler that is no table (see `SolverTable.of_sampler`), or a number below its minimum.
        ArithmeticError: no solver gives finite samples.
    """
    sampler = sampler_of(problem)
    check_numbers(problem, total_iters=total_iters)
    if bool(state.done.all()):
        return
    taught = yield from teach(problem, state, teacher_timesteps, starts, target)
    beginnings = [_candidate_of(state, sampler, problem)]
    if free_starts and not bool(state.iterations.any()):
        beginnings.append(replace(beginnings[0], timesteps=best_start(problem, free_starts, taught)))
        yield state

    def compared_on(rows: Tensor) -> Residuals:
        return partial(_residuals, problem, sampler, taught, rows, NUM_CANDIDATES * (num_calls + 1))

    with_start = with_start and problem.noise_schedule.can_start_later
    num_calls, per_step = sampler.network_calls(problem.timesteps), sampler.calls_per_step
    columns = solver_columns(num_calls, calls_per_step=per_step, with_ratios=with_ratios, with_start=with_start)
    held = samples_held(num_calls, calls_per_step=per_step)
    damping = float(state.memory[0, 0]) or FIRST_DAMPING
    fruitless = int(state.memory[0, 1])
    for iteration in range(int(state.iterations.min()), total_iters):
        rows = _draw(problem, iteration)
        differentiated = partial(_residuals, problem, sampler, taught, rows[0], held)
        ends = [
            improve(
                beginning,
                columns,
                damping,
                problem.noise_schedule,
                differentiated,
                compared_on(rows[1]),
                quotient_units_of([problem.network_dtype]),
            )
            for beginning in beginnings
        ]
        if len(ends) > 1:  # A few samples that end in another mode make up much of the mean, so all are looked at.
            everyone = torch.arange(len(problem.population), device=problem.population.device)
            distances = mean_distances([end.candidate for end in ends], compared_on(everyone))
            ends = [ends[int(distances.argmin())]]
        current, loss, damping, is_fruitless = ends[0]
        fruitless = fruitless + 1 if is_fruitless else 0

        state.timesteps, state.t_ratios = current.timesteps, current.t_ratios
        state.solver_table = current.table(sampler, problem.noise_schedule, problem.model_fn.clipping)
        state.memory[:, 0], state.memory[:, 1] = damping, float(fruitless)
        state.note(list(range(problem.num_steps)), torch.full((problem.num_steps,), loss / problem.num_steps))
        state.done[:] = iteration + 1 >= total_iters or fruitless >= MAX_FRUITLESS
        yield state
        if bool(state.done.all()):
            return
        # The next iteration starts from the saved values, so that a resumed run and an unbroken one are equal.
        beginnings = [_candidate_of(state, sampler, problem)]


def sampler_of(problem: TuningProblem) -> Sampler:
    """The problem's sampler. Raises: ValueError, if its solver cannot be learned."""
    if not isinstance(problem.step_fn, SamplerStep):
        raise ValueError("the step function is no sampler's; accepted, to learn its solver: one of a Sampler")
    if problem.adds_noise:
        raise ValueError("the sampler adds noise; accepted, to learn its solver: a deterministic one, with eta 0")
    return problem.step_fn.sampler


def run_candidates(
    problem: TuningProblem, sampler: Sampler, candidates: Sequence[Candidate], first_calls: Sequence[int], rows: Tensor
) -> Tensor:
    """The end results of K solvers from the same rows of the population, `(K, len(rows), ...)`.

    Args:
        first_calls: the first call, for each solver, at which it differs from solver 0, rising. The calls before are
            not made, and what they would give is not held.
    """
    grids = torch.stack([candidate.timesteps for candidate in candidates])
    t_ratios = torch.stack([candidate.t_ratios for candidate in candidates])
    offsets = torch.stack([candidate.offsets for candidate in candidates])
    table = SolverTable.of_sampler(sampler, problem.noise_schedule, grids, problem.model_fn.clipping).plus(offsets)
    times = grids[:, :-1] if table.times is None else table.times
    # In call i, the first `acting[i]` solvers differ, and the others are still solver 0.
    acting = [sum(first <= i for first in first_calls) for i in range(table.num_calls)] + [len(candidates)]
    x = _starting_noise(problem, grids[: acting[0], 0], rows)
    x0s: list[Tensor] = []
    for i in range(table.num_calls):
        known = slice(acting[i])
        of_step = t_ratios[known, i // sampler.calls_per_step]
        x0, eps = _predict(problem, sampler, x, times[known, i], of_step, rows)
        x0s.append(x0)
        count = acting[i + 1]
        x = _like(table.a[:count, i], x) * _with_others(x, count)
        if table.eps is not None:
            x = x + _like(table.eps[:count, i], x) * _with_others(eps, count)
        for j, x0 in enumerate(x0s):
            if bool(table.b[:count, i, j].any()):
                x = x + _like(table.b[:count, i, j], x) * _with_others(x0, count)
    return x


def _starting_noise(problem: TuningProblem, t: Tensor, rows: Tensor) -> Tensor:
    """The population's noise, scaled to start from the times `(K,)`: `(K, len(rows), ...)`."""
    x_T = problem.population[rows]
    factors = torch.tensor([problem.starting_factor(each) for each in t])
    return _like(factors, x_T[None]) * x_T


def _with_others(values: Tensor, count: int) -> Tensor:
    """Values of the first solvers `(K, ...)`, then those of solver 0 up to `count`."""
    return torch.cat([values, values[:1].expand(count - len(values), *values.shape[1:])])


def _predict(
    problem: TuningProblem, sampler: Sampler, x: Tensor, t: Tensor, t_ratios: Tensor, rows: Tensor
) -> Prediction:
    """x0 and eps `(K, S, ...)` as predicted in x `(K, S, ...)` at times `(K,)`, in batches of the problem's size."""
    shape, (num_solvers, num_rows) = x.shape, x.shape[:2]
    x, row = x.flatten(0, 1), torch.arange(num_rows).repeat(num_solvers)
    t, t_ratios = (values.repeat_interleave(num_rows).to(x.device) for values in (t, t_ratios))
    uncond = problem.step_kwargs.get("uncond_condition")
    parts = []
    for start in range(0, len(x), problem.batch_size):
        part = slice(start, start + problem.batch_size)
        index = rows[row[part]]
        condition, model_fn = problem.condition_of(index), problem.model_fn_of(index)
        parts.append(model_fn.predict_for(sampler.name, x[part], t[part], t_ratios[part], condition, uncond))
    return Prediction(*(torch.cat(each).reshape(shape) for each in zip(*parts, strict=True)))


def _residuals(
    problem: TuningProblem,
    sampler: Sampler,
    taught: Tensor,
    rows: Tensor,
    held_per_row: int,
    candidates: Sequence[Candidate],
    first_calls: Sequence[int],
) -> Iterator[Tensor]:
    """`x0 - x0*` of each solver and row, `(K, S, D)`, in groups of as many rows as memory allows, at least one.

    Args:
        held_per_row: how many samples and predictions of a row are in memory at once.
    """
    size = max(1, MAX_VALUES_HELD // (held_per_row * problem.population[0].numel()))
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        yield (run_candidates(problem, sampler, candidates, first_calls, group) - taught[group]).flatten(2)


def _draw(problem: TuningProblem, iteration: int) -> tuple[Tensor, Tensor]:
    """Rows of the population for the Jacobian, and others to compare candidates on, if the population has as many."""
    num_rows = problem.batch_size * (1 + COMPARED_PER_SAMPLE)
    order = torch.randperm(len(problem.population), generator=keyed_generator(problem.seed, 0, iteration))
    order = order.repeat(-(-num_rows // len(order)))[:num_rows].to(problem.population.device)
    return order[: problem.batch_size], order[problem.batch_size :]


def _candidate_of(state: TuningState, sampler: Sampler, problem: TuningProblem) -> Candidate:
    # Without a column `eps`, a table of DDIM that clips x0 was saved by a version that knew none. Then the offsets are
    # taken from a table like it, and learning goes on from a solver that is about the same.
    clipping = None if state.solver_table is not None and state.solver_table.eps is None else problem.model_fn.clipping
    own = SolverTable.of_sampler(sampler, problem.noise_schedule, state.timesteps, clipping)
    table = state.solver_table or own
    offsets = torch.cat([(table.a - own.a)[:, None], table.b - own.b], dim=1)
    return Candidate(state.timesteps, state.t_ratios, offsets)


def _like(coefficients: Tensor, x: Tensor) -> Tensor:
    """Coefficients `(K,)`, ready to multiply x `(K, S, ...)`."""
    return coefficients.to(x).reshape(-1, *[1] * (x.ndim - 1))
