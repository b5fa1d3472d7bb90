"""The numbers that `tune_solver` learns. A service that only counts a job's costs reads this without PyTorch."""

from typing import Literal, NamedTuple

# Besides no change, each iteration tries the steps of so many dampings.
NUM_DAMPINGS = 3
NUM_CANDIDATES = 1 + NUM_DAMPINGS
# Candidates are compared on so many samples for each of the Jacobian's. They are other samples.
COMPARED_PER_SAMPLE = 2

# A coefficient reaches only so far back if there are more calls than these.
MAX_CALLS_OF_FULL_ROWS = 10
SHORT_REACH = 4


class Column(NamedTuple):
    """A number that is learned.

    Attributes:
        i, j: which one: `t_ratios[i]`, `timesteps[i]`, `a[i]` or `b[i, j]`.
        first_call: the first call of the network whose input it changes.
    """

    kind: Literal["t_ratio", "time", "a", "b"]
    i: int
    j: int
    first_call: int


def solver_columns(
    num_calls: int, *, calls_per_step: int = 1, with_ratios: bool = True, with_start: bool = True
) -> list[Column]:
    """The numbers to learn of a solver with so many network calls, by where they first act.

    Ratios and times are those of steps, `a` and `b` those of calls. The times of calls within a step follow from the
    grid.

    Args:
        calls_per_step: the sampler's; the last step may have fewer.
        with_ratios: whether the ratios are among them.
        with_start: whether the first time is. A later one is a free step from `T`: there the network is not asked, and
            x0 is taken to be 0, so that the noise is scaled down to the first time's level (AFS; Dockhorn et al. 2022).
    """
    reach = num_calls if num_calls <= MAX_CALLS_OF_FULL_ROWS else SHORT_REACH
    firsts = range(0, num_calls, calls_per_step)  # The first call of each step.
    columns = [Column("t_ratio", i, 0, first) for i, first in enumerate(firsts)] if with_ratios else []
    columns += [Column("time", 0, 0, 0)] if with_start else []
    # A time first changes what comes of the first call of the step that ends at it.
    columns += [Column("time", i + 1, 0, first + 1) for i, first in enumerate(firsts[:-1])]
    for i in range(num_calls):
        columns.append(Column("a", i, 0, i + 1))
        columns += [Column("b", i, j, i + 1) for j in range(max(0, i + 1 - reach), i + 1)]
    return sorted(columns, key=lambda column: column.first_call)


def jacobian_rows(num_calls: int, *, calls_per_step: int = 1, with_ratios: bool = True) -> int:
    """The rows that one sample's Jacobian puts through the network, at most."""
    columns = solver_columns(num_calls, calls_per_step=calls_per_step, with_ratios=with_ratios)
    return num_calls + sum(num_calls - column.first_call for column in columns)


def rows_per_sample(num_calls: int, *, calls_per_step: int = 1, with_ratios: bool = True) -> int:
    """The rows that one iteration puts through the network, at most, per sample of its Jacobian."""
    differentiated = jacobian_rows(num_calls, calls_per_step=calls_per_step, with_ratios=with_ratios)
    return differentiated + COMPARED_PER_SAMPLE * NUM_CANDIDATES * num_calls


def samples_held(num_calls: int, *, calls_per_step: int = 1) -> int:
    """The samples in memory for one sample's Jacobian: each run's newest, and what it predicted where it differs."""
    num_columns = len(solver_columns(num_calls, calls_per_step=calls_per_step))
    return jacobian_rows(num_calls, calls_per_step=calls_per_step) + num_columns + 1
