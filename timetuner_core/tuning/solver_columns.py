"""The numbers that `tune_solver` learns. A service that only counts a job's costs reads this without PyTorch."""

from typing import Literal, NamedTuple

# Besides no change, each iteration tries the steps of so many dampings.
NUM_DAMPINGS = 3
NUM_CANDIDATES = 1 + NUM_DAMPINGS
# Candidates are compared on so many samples for each of the Jacobian's. They are other samples.
COMPARED_PER_SAMPLE = 2

# With more steps than these, a coefficient reaches only so far back.
MAX_STEPS_OF_FULL_ROWS = 10
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


def solver_columns(num_steps: int, *, with_ratios: bool = True, with_start: bool = True) -> list[Column]:
    """The numbers to learn of a solver with so many steps, by where they first act.

    Args:
        with_ratios: whether the ratios are among them.
        with_start: whether the first time is. A later one is a free step from `T`: there the network is not asked, and
            x0 is taken to be 0, so that the noise is scaled down to the first time's level (AFS; Dockhorn et al. 2022).
    """
    reach = num_steps if num_steps <= MAX_STEPS_OF_FULL_ROWS else SHORT_REACH
    columns = [Column("t_ratio", i, 0, i) for i in range(num_steps)] if with_ratios else []
    columns += [Column("time", i, 0, i) for i in range(0 if with_start else 1, num_steps)]
    for i in range(num_steps):
        columns.append(Column("a", i, 0, i + 1))
        columns += [Column("b", i, j, i + 1) for j in range(max(0, i + 1 - reach), i + 1)]
    return sorted(columns, key=lambda column: column.first_call)


def jacobian_rows(num_steps: int, *, with_ratios: bool = True) -> int:
    """The rows that one sample's Jacobian puts through the network, at most."""
    columns = solver_columns(num_steps, with_ratios=with_ratios)
    return num_steps + sum(num_steps - column.first_call for column in columns)


def rows_per_sample(num_steps: int, *, with_ratios: bool = True) -> int:
    """The rows that one iteration puts through the network, at most, per sample of its Jacobian."""
    return jacobian_rows(num_steps, with_ratios=with_ratios) + COMPARED_PER_SAMPLE * NUM_CANDIDATES * num_steps


def samples_held(num_steps: int) -> int:
    """The samples in memory for one sample's Jacobian: each run's newest, and what it predicted where it differs."""
    return jacobian_rows(num_steps) + len(solver_columns(num_steps)) + 1
