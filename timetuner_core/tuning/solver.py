"""The whole solver, learned from forward calls of the network alone.

Its time grid, its ratios and the coefficients of its table are changed together, by Gauss-Newton steps with Levenberg's
damping. The Jacobian is made of difference quotients: one more run of the sampler for each number that is learned. Such
a run begins where the number first acts, since all calls before are those of the unchanged solver.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timetuner_core.samplers import Sampler, SamplerStep
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuning.draws import keyed_generator
from timetuner_core.tuning.end_to_end import teach
from timetuner_core.tuning.problem import TuningProblem, TuningState, check_numbers
from timetuner_core.tuning.solver_columns import COMPARED_PER_SAMPLE, NUM_DAMPINGS, Column, samples_held, solver_columns

# One unit of each kind of number: a change of about so much is small, and of comparable effect.
# A time's unit is a share of the way to its nearer neighbour.
UNITS = {"t_ratio": 0.02, "time": 0.1, "a": 0.02, "b": 0.05}
QUOTIENT_UNITS = 0.25  # The step of a difference quotient.
MAX_UNITS = 8.0  # The largest change of a number in one iteration.
MAX_TIME_MOVE = 0.4  # Two neighbours that meet halfway would both move by 0.5 of the way.

# The damping's share of the mean curvature. Each iteration tries it, and that divided and multiplied by a factor.
FIRST_DAMPING = 1e-2
DAMPING_FACTOR = 8.0
MIN_DAMPING, MAX_DAMPING = 1e-8, 1e8
MAX_FRUITLESS = 3  # It ends after so many iterations without a better candidate.

MAX_VALUES_HELD = 2**24  # The values of samples and predictions that are in memory at once, unless one row has more.


@dataclass(frozen=True)
class Candidate:
    """A solver as its tuner changes it, float64 on the CPU.

    Attributes:
        timesteps: `(num_steps + 1,)`. t_ratios: `(num_steps,)`.
        offsets: `(num_steps, num_steps + 1)`, what is added to the sampler's own table on this grid; see
            `SolverTable.plus`.
    """

    timesteps: Tensor
    t_ratios: Tensor
    offsets: Tensor

    def moved(self, problem: TuningProblem, columns: Sequence[Column], units: Tensor) -> "Candidate":
        """The candidate with each number changed by so many units `(len(columns),)`, within its bounds."""
        timesteps, t_ratios, offsets = self.timesteps.clone(), self.t_ratios.clone(), self.offsets.clone()
        steps = self.timesteps[:-1] - self.timesteps[1:]
        nearer = torch.minimum(steps[:-1], steps[1:])
        for column, amount in zip(columns, units.tolist(), strict=True):
            change = amount * UNITS[column.kind]
            if column.kind == "t_ratio":
                t_ratios[column.i] += change
            elif column.kind == "time":
                share = max(-MAX_TIME_MOVE, min(MAX_TIME_MOVE, change))
                timesteps[column.i] += share * nearer[column.i - 1]
            else:
                offsets[column.i, 0 if column.kind == "a" else 1 + column.j] += change
        lower, upper = problem.ratio_bounds(timesteps)
        return Candidate(timesteps, t_ratios.clamp(lower, upper), offsets)

    def table(self, sampler: Sampler, problem: TuningProblem) -> SolverTable:
        return SolverTable.of_sampler(sampler, problem.noise_schedule, self.timesteps).plus(self.offsets)


@torch.no_grad()
def tune_solver(
    problem: TuningProblem,
    state: TuningState,
    teacher_timesteps: Tensor,
    *,
    total_iters: int = 10,
    starts: Sequence[Tensor] = (),
    target: Tensor | None = None,
) -> Iterator[TuningState]:
    """Learn grid, ratios and coefficients, so that the batch mean of `|| x0 - x0* ||` falls, where x0* is the end
    result of a teacher: the same sampler, untuned, on a finer grid. The norm is not squared, as in
    `tune_end_to_end`, so each sample's squared residual has the weight `1 / || x0 - x0* ||`.

    Each iteration takes the Jacobian on `batch_size` samples of the population, solves for the change under three
    dampings, and keeps the best of the three and of no change, on `2 batch_size` other samples. It ends early after
    some iterations without a better one. There is no backward pass.

    `starts` and `target` are those of `tune_end_to_end`. The population is initial noise.

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
    current = _candidate_of(state, sampler, problem)
    columns = solver_columns(problem.num_steps)
    damping = float(state.memory[0, 0]) or FIRST_DAMPING
    fruitless = int(state.memory[0, 1])
    for iteration in range(int(state.iterations.min()), total_iters):
        rows = _draw(problem, iteration)
        curvature, gradient = _normal_equations(problem, sampler, current, columns, rows[0], taught)
        dampings = [damping * DAMPING_FACTOR ** (k - 1) for k in range(NUM_DAMPINGS)]
        candidates = [current]
        for share in dampings:
            added = share * float(curvature.diagonal().mean()) + 1e-300  # Numbers without any effect stay.
            damped = curvature + added * torch.eye(len(columns), dtype=torch.float64)
            units = -torch.linalg.solve(damped, gradient)
            candidates.append(current.moved(problem, columns, units.clamp(-MAX_UNITS, MAX_UNITS)))
        losses = _mean_distances(problem, sampler, candidates, rows[1], taught)
        if not bool(losses.isfinite().any()):
            raise ArithmeticError("the network's answers led to NaN or infinite values")
        best = int(losses.nan_to_num(torch.inf).argmin())
        current = candidates[best]
        damping = dampings[best - 1] if best else damping * DAMPING_FACTOR**2
        damping = min(max(damping, MIN_DAMPING), MAX_DAMPING)
        fruitless = 0 if best else fruitless + 1

        state.timesteps, state.t_ratios = current.timesteps, current.t_ratios
        state.solver_table = current.table(sampler, problem)
        state.memory[:, 0], state.memory[:, 1] = damping, float(fruitless)
        state.note(list(range(problem.num_steps)), losses[best].expand(problem.num_steps) / problem.num_steps)
        state.done[:] = iteration + 1 >= total_iters or fruitless >= MAX_FRUITLESS
        yield state
        if bool(state.done.all()):
            return
        # The next iteration starts from the saved values, so that a resumed run and an unbroken one are equal.
        current = _candidate_of(state, sampler, problem)


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
    table = SolverTable.of_sampler(sampler, problem.noise_schedule, grids).plus(offsets)
    # In step i, the first `acting[i]` solvers differ, and the others are still solver 0.
    acting = [sum(first <= i for first in first_calls) for i in range(problem.num_steps)] + [len(candidates)]
    x = _with_others(problem.population[rows][None], acting[0])
    x0s: list[Tensor] = []
    for i in range(problem.num_steps):
        known = slice(acting[i])
        x0s.append(_predict(problem, sampler, x, grids[known, i], t_ratios[known, i], rows))
        count = acting[i + 1]
        x = _like(table.a[:count, i], x) * _with_others(x, count)
        for j, x0 in enumerate(x0s):
            if bool(table.b[:count, i, j].any()):
                x = x + _like(table.b[:count, i, j], x) * _with_others(x0, count)
    return x


def _with_others(values: Tensor, count: int) -> Tensor:
    """Values of the first solvers `(K, ...)`, then those of solver 0 up to `count`."""
    return torch.cat([values, values[:1].expand(count - len(values), *values.shape[1:])])


def _predict(problem: TuningProblem, sampler: Sampler, x: Tensor, t: Tensor, t_ratios: Tensor, rows: Tensor) -> Tensor:
    """x0 `(K, S, ...)` as predicted in x `(K, S, ...)` at times `(K,)`, in batches of the problem's size."""
    num_solvers, num_rows = x.shape[:2]
    x, row = x.flatten(0, 1), torch.arange(num_rows).repeat(num_solvers)
    t, t_ratios = (values.repeat_interleave(num_rows).to(x.device) for values in (t, t_ratios))
    uncond = problem.step_kwargs.get("uncond_condition")
    parts = []
    for start in range(0, len(x), problem.batch_size):
        part = slice(start, start + problem.batch_size)
        condition = problem.condition_of(rows[row[part]])
        prediction = problem.model_fn.predict_for(sampler.name, x[part], t[part], t_ratios[part], condition, uncond)
        parts.append(prediction.x0)
    return torch.cat(parts).reshape(num_solvers, num_rows, *x.shape[1:])


def _normal_equations(
    problem: TuningProblem,
    sampler: Sampler,
    current: Candidate,
    columns: Sequence[Column],
    rows: Tensor,
    taught: Tensor,
) -> tuple[Tensor, Tensor]:
    """`sum_s J_s^T J_s / ||r_s||` `(P, P)` and `sum_s J_s^T r_s / ||r_s||` `(P,)`, by difference quotients."""
    candidates, amounts = [current], []
    for k in range(len(columns)):
        units = torch.zeros(len(columns), dtype=torch.float64)
        units[k] = QUOTIENT_UNITS
        moved = current.moved(problem, columns, units)
        if torch.equal(moved.t_ratios, current.t_ratios) and columns[k].kind == "t_ratio":
            units[k] = -QUOTIENT_UNITS  # The ratio is at its upper bound.
            moved = current.moved(problem, columns, units)
        candidates.append(moved)
        amounts.append(float(units[k]))
    first_calls = [0, *(column.first_call for column in columns)]
    curvature = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    gradient = torch.zeros(len(columns), dtype=torch.float64)
    for group in _groups(problem, rows, samples_held(problem.num_steps)):
        samples = run_candidates(problem, sampler, candidates, first_calls, group)
        residuals = (samples - taught[group]).flatten(2).double().cpu()
        residual = residuals[0]
        jacobian = (residuals[1:] - residual) / torch.tensor(amounts, dtype=torch.float64)[:, None, None]
        weight = 1 / residual.norm(dim=1).clamp(min=1e-12)
        weighted = weight[:, None] * jacobian
        curvature += torch.einsum("psd,qsd->pq", weighted, jacobian)
        gradient += torch.einsum("psd,sd->p", weighted, residual)
    return curvature, gradient


def _mean_distances(
    problem: TuningProblem, sampler: Sampler, candidates: Sequence[Candidate], rows: Tensor, taught: Tensor
) -> Tensor:
    """The mean of `|| x0 - x0* ||` of each solver, `(K,)`."""
    first_calls = [0] * len(candidates)
    total = torch.zeros(len(candidates), dtype=torch.float64)
    for group in _groups(problem, rows, len(candidates) * (problem.num_steps + 1)):
        samples = run_candidates(problem, sampler, candidates, first_calls, group)
        total += (samples - taught[group]).flatten(2).norm(dim=2).double().cpu().sum(dim=1)
    return total / len(rows)


def _groups(problem: TuningProblem, rows: Tensor, held_per_row: int) -> Iterator[Tensor]:
    """The rows, as many at once as memory allows, at least one."""
    values_per_row = held_per_row * problem.population[0].numel()
    size = max(1, MAX_VALUES_HELD // values_per_row)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _draw(problem: TuningProblem, iteration: int) -> tuple[Tensor, Tensor]:
    """Rows of the population for the Jacobian, and others to compare candidates on, if the population has as many."""
    num_rows = problem.batch_size * (1 + COMPARED_PER_SAMPLE)
    order = torch.randperm(len(problem.population), generator=keyed_generator(problem.seed, 0, iteration))
    order = order.repeat(-(-num_rows // len(order)))[:num_rows].to(problem.population.device)
    return order[: problem.batch_size], order[problem.batch_size :]


def _candidate_of(state: TuningState, sampler: Sampler, problem: TuningProblem) -> Candidate:
    own = SolverTable.of_sampler(sampler, problem.noise_schedule, state.timesteps)
    table = state.solver_table or own
    offsets = torch.cat([(table.a - own.a)[:, None], table.b - own.b], dim=1)
    return Candidate(state.timesteps, state.t_ratios, offsets)


def _like(coefficients: Tensor, x: Tensor) -> Tensor:
    """Coefficients `(K,)`, ready to multiply x `(K, S, ...)`."""
    return coefficients.to(x).reshape(-1, *[1] * (x.ndim - 1))
