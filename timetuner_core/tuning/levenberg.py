"""Gauss-Newton steps with Levenberg's damping, for the numbers of a solver: its grid, ratios and table.

The Jacobian is made of difference quotients: one more run of the solver for each number that is learned. How a solver
is run is the caller's business, so that a network of ours and a whole pipeline are tuned alike.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from timetuner_core.clipping import Clipping
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers import Sampler
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuning.problem import ratio_bounds
from timetuner_core.tuning.solver_columns import NUM_DAMPINGS, Column

# One unit of each kind of number: a change of about so much is small, and of comparable effect.
# A time's unit is a share of the way to its nearer neighbour.
UNITS = {"t_ratio": 0.02, "time": 0.1, "a": 0.02, "b": 0.05}
# The step of a difference quotient, in units.
QUOTIENT_UNITS = {"t_ratio": 0.25, "time": 0.25, "a": 0.25, "b": 0.25}
# In half precision many networks round the told time by up to 1/128 of it, and all round their answers. A difference
# quotient has to take larger steps there, those of a ratio several times the rounding.
QUOTIENT_UNITS_IN_HALF_PRECISION = {"t_ratio": 2.0, "time": 1.0, "a": 1.0, "b": 1.0}
HALF_PRECISION = (torch.float16, torch.bfloat16)
MAX_UNITS = 8.0  # The largest change of a number in one iteration.
MAX_TIME_MOVE = 0.4  # Two neighbours that meet halfway would both move by 0.5 of the way.

# The damping's share of the mean curvature. Each iteration tries it, and that divided and multiplied by a factor.
FIRST_DAMPING = 1e-2
DAMPING_FACTOR = 8.0
MIN_DAMPING, MAX_DAMPING = 1e-8, 1e8
MAX_FRUITLESS = 3  # A tuner ends after so many iterations without a better candidate.


@dataclass(frozen=True)
class Candidate:
    """A solver as its tuner changes it, float64 on the CPU.

    Attributes:
        timesteps: `(num_steps + 1,)`. t_ratios: `(num_steps,)`.
        offsets: `(num_calls, num_calls + 1)`, what is added to the sampler's own table on this grid; see
            `SolverTable.plus`. The table's column `eps` is not learned.
    """

    timesteps: Tensor
    t_ratios: Tensor
    offsets: Tensor

    def moved(self, noise_schedule: NoiseSchedule, columns: Sequence[Column], units: Tensor) -> "Candidate":
        """The candidate with each number changed by so many units `(len(columns),)`, within its bounds.

        The first time stays at or below where the candidate or the schedule starts, whichever is later.
        """
        timesteps, t_ratios, offsets = self.timesteps.clone(), self.t_ratios.clone(), self.offsets.clone()
        latest = timesteps[0].clamp(min=noise_schedule.t_start)
        steps = self.timesteps[:-1] - self.timesteps[1:]
        nearer = torch.cat([steps[:1], torch.minimum(steps[:-1], steps[1:])])
        for column, amount in zip(columns, units.tolist(), strict=True):
            change = amount * UNITS[column.kind]
            if column.kind == "t_ratio":
                t_ratios[column.i] += change
            elif column.kind == "time":
                share = max(-MAX_TIME_MOVE, min(MAX_TIME_MOVE, change))
                timesteps[column.i] = (timesteps[column.i] + share * nearer[column.i]).clamp(max=latest)
            else:
                offsets[column.i, 0 if column.kind == "a" else 1 + column.j] += change
        calls_on_the_way = len(offsets) > len(t_ratios)
        lower, upper = ratio_bounds(noise_schedule, timesteps, calls_on_the_way=calls_on_the_way)
        return Candidate(timesteps, t_ratios.clamp(lower, upper), offsets)

    def equals(self, other: "Candidate") -> bool:
        pairs = ((self.timesteps, other.timesteps), (self.t_ratios, other.t_ratios), (self.offsets, other.offsets))
        return all(torch.equal(*pair) for pair in pairs)

    def table(self, sampler: Sampler, noise_schedule: NoiseSchedule, clipping: Clipping | None) -> SolverTable:
        return SolverTable.of_sampler(sampler, noise_schedule, self.timesteps, clipping).plus(self.offsets)


# What solvers leave of the distance to their teacher, `(len(candidates), S, D)`, in groups of samples that fit into
# memory. The second argument tells the first call of the network at which each solver differs from the first one.
Residuals: TypeAlias = Callable[[Sequence[Candidate], Sequence[int]], Iterable[Tensor]]


class Improvement(NamedTuple):
    """The findings of one iteration.

    Attributes:
        candidate: the best of the solvers that were tried, the one before among them.
        loss: its mean distance to the teacher. damping: that of the next iteration.
        is_fruitless: whether the solver before was the best.
    """

    candidate: Candidate
    loss: float
    damping: float
    is_fruitless: bool


def quotient_units_of(network_dtypes: Iterable[torch.dtype]) -> Mapping[str, float]:
    """The steps of difference quotients, in units, that networks of these dtypes answer by more than rounding."""
    has_half = any(dtype in HALF_PRECISION for dtype in network_dtypes)
    return QUOTIENT_UNITS_IN_HALF_PRECISION if has_half else QUOTIENT_UNITS


def improve(
    current: Candidate,
    columns: Sequence[Column],
    damping: float,
    noise_schedule: NoiseSchedule,
    differentiated: Residuals,
    compared: Residuals,
    quotient_units: Mapping[str, float] = QUOTIENT_UNITS,
) -> Improvement:
    """One iteration: the Jacobian, the steps under three dampings, and the best of them and of no change.

    Args:
        damping: as a share of the mean curvature.
        differentiated: the residuals that the Jacobian is taken of. compared: those of other samples.

    Raises:
        ArithmeticError: no solver gives finite samples.
    """
    curvature, gradient = _normal_equations(current, columns, noise_schedule, differentiated, quotient_units)
    dampings = [damping * DAMPING_FACTOR ** (k - 1) for k in range(NUM_DAMPINGS)]
    candidates = [current]
    for share in dampings:
        added = share * float(curvature.diagonal().mean()) + 1e-300  # Numbers without any effect stay.
        damped = curvature + added * torch.eye(len(columns), dtype=torch.float64)
        units = -torch.linalg.solve(damped, gradient)
        candidates.append(current.moved(noise_schedule, columns, units.clamp(-MAX_UNITS, MAX_UNITS)))
    losses = mean_distances(candidates, compared)
    if not bool(losses.isfinite().any()):
        raise ArithmeticError("the network's answers led to NaN or infinite values")
    best = int(losses.nan_to_num(torch.inf).argmin())
    following = dampings[best - 1] if best else damping * DAMPING_FACTOR**2
    following = min(max(following, MIN_DAMPING), MAX_DAMPING)
    return Improvement(candidates[best], float(losses[best]), following, is_fruitless=best == 0)


def mean_distances(candidates: Sequence[Candidate], residuals_of: Residuals) -> Tensor:
    """How far each candidate's samples are from their teacher's, `(len(candidates),)`."""
    groups = [residuals.norm(dim=2).double().cpu() for residuals in residuals_of(candidates, [0] * len(candidates))]
    return torch.cat(groups, dim=1).mean(dim=1)


def _normal_equations(
    current: Candidate,
    columns: Sequence[Column],
    noise_schedule: NoiseSchedule,
    residuals_of: Residuals,
    quotient_units: Mapping[str, float],
) -> tuple[Tensor, Tensor]:
    """`sum_s J_s^T J_s / ||r_s||` `(P, P)` and `sum_s J_s^T r_s / ||r_s||` `(P,)`, by difference quotients."""
    candidates, amounts = [current], []
    for k, column in enumerate(columns):
        units = torch.zeros(len(columns), dtype=torch.float64)
        units[k] = quotient_units[column.kind]
        moved = current.moved(noise_schedule, columns, units)
        if moved.equals(current):  # The number is at its upper bound.
            units[k] = -quotient_units[column.kind]
            moved = current.moved(noise_schedule, columns, units)
        candidates.append(moved)
        amounts.append(float(units[k]))
    first_calls = [0, *(column.first_call for column in columns)]
    curvature = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    gradient = torch.zeros(len(columns), dtype=torch.float64)
    for group in residuals_of(candidates, first_calls):
        residuals = group.double().cpu()
        residual = residuals[0]
        jacobian = (residuals[1:] - residual) / torch.tensor(amounts, dtype=torch.float64)[:, None, None]
        weight = 1 / residual.norm(dim=1).clamp(min=1e-12)
        weighted = weight[:, None] * jacobian
        curvature += torch.einsum("psd,qsd->pq", weighted, jacobian)
        gradient += torch.einsum("psd,sd->p", weighted, residual)
    return curvature, gradient
