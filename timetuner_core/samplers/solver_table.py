"""A deterministic sampler as a table of numbers: `x_{i+1} = a_i x_i + sum_{j <= i} b_ij x0_j`.

`x0_j` is what the network predicted, guided, in step j. Each sampler that calls the network once per step is such a
table, whose numbers follow from its time grid. A tuner may change them freely: then the whole solver is learned (BNS,
Shaul et al. 2024; S4S, Frankel et al. 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from timetuner_core.coefficients import NoiseLevel
from timetuner_core.guided_model import Prediction, expand_like
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers import Past, Sampler, Step, get_sampler


@dataclass(frozen=True)
class SolverTable:
    """The coefficients of a solver, float64.

    Attributes:
        a: `(num_steps,)`, the factor of x_i in x_{i+1}.
        b: `(num_steps, num_steps)`, the factor of x0_j in x_{i+1}; 0 above the diagonal.

    Tables of several grids may be stacked along a dimension before these.
    """

    a: Tensor
    b: Tensor

    @classmethod
    def of_sampler(cls, sampler: Sampler, noise_schedule: NoiseSchedule, timesteps: Tensor) -> Self:
        """The table of a sampler on a grid `(num_steps + 1,)`, or on several, `(K, num_steps + 1)`.

        The sampler is run on unit vectors in place of x_T and of each x0_j.

        Raises:
            ValueError: a sampler that adds noise, or calls the network more than once per step.
        """
        _check_is_table(sampler)
        grids = timesteps.double().cpu().reshape(-1, timesteps.shape[-1])
        num_grids, num_steps = len(grids), grids.shape[1] - 1
        units = torch.eye(num_steps + 1, dtype=torch.float64).expand(num_grids, -1, -1)
        x, states, history = units[:, 0], [units[:, 0]], tuple[Past, ...]()
        for i in range(num_steps):
            said = units[:, i + 1]
            x_s, x0 = _step_on_vectors(sampler, noise_schedule, x, said, grids[:, i], grids[:, i + 1], history)
            history = (*history, Past(grids[:, i], x, x0))[-sampler.history_length :] if sampler.history_length else ()
            x = x_s
            states.append(x)
        # x_i = A_i x_T + sum_j B_ij x0_j, which is rewritten in terms of the step before.
        stacked = torch.stack(states, dim=1)
        A, B = stacked[..., 0], stacked[..., 1:]
        a = A[:, 1:] / A[:, :-1]
        b = B[:, 1:] - a[..., None] * B[:, :-1]
        shape = timesteps.shape[:-1]
        return cls(a.reshape(*shape, num_steps), b.tril().reshape(*shape, num_steps, num_steps))

    @property
    def num_steps(self) -> int:
        return self.a.shape[-1]

    def plus(self, offsets: Tensor) -> "SolverTable":
        """The table with offsets `(..., num_steps, num_steps + 1)` added: column 0 to `a`, the rest to `b`."""
        return SolverTable(self.a + offsets[..., 0], self.b + offsets[..., 1:].tril())

    def sampler(self, name: str) -> Sampler:
        """The sampler that takes these steps, one after the other from the first; x0 is clipped as `name` clips it."""
        by_lag = self.by_lag()

        def update(step: Step) -> tuple[Tensor, Tensor]:
            return _step_by_lag(step, by_lag[len(step.history)])

        return Sampler(name, update, order=1, history_length=self.num_steps)

    def by_lag(self) -> list[list[float]]:
        """For each step i the numbers `a_i, b_ii, b_i,i-1, ..., b_i0`."""
        rows = zip(self.a.tolist(), self.b.tolist(), strict=True)
        return [[a, *row[i::-1]] for i, (a, row) in enumerate(rows)]

    def to_dict(self) -> dict[str, Any]:
        """Lists of numbers; `b` without what is above the diagonal."""
        return {"a": self.a.tolist(), "b": [row[: i + 1] for i, row in enumerate(self.b.tolist())]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The table that `to_dict` wrote.

        Raises:
            ValueError: rows of other lengths, or a number that is not finite.
        """
        a, rows = values["a"], values["b"]
        if len(rows) != len(a) or any(len(row) != i + 1 for i, row in enumerate(rows)):
            raise ValueError(f"table has rows of {[len(row) for row in rows]}; accepted: 1 to {len(a)}, one per step")
        b = torch.tensor([[*row, *[0.0] * (len(a) - len(row))] for row in rows], dtype=torch.float64)
        table = cls(torch.tensor(a, dtype=torch.float64), b)
        if not bool(torch.isfinite(table.a).all() & torch.isfinite(table.b).all()):
            raise ValueError("table has a number that is not finite; accepted: finite ones")
        return table


def sampler_of_rows(name: str, by_lag: Tensor) -> Sampler:
    """The sampler that takes a step of another table with each sample of a batch, or another step of it.

    Args:
        by_lag: each sample's step, `(B, 1 + num_lags)`, as `SolverTable.by_lag` has it; 0 where no step was before.
    """

    def update(step: Step) -> tuple[Tensor, Tensor]:
        x_t = step.x_t
        return _step_by_lag(step, [expand_like(each, x_t) for each in by_lag.to(x_t.device, x_t.dtype).unbind(1)])

    return Sampler(name, update, order=1, history_length=by_lag.shape[1] - 2, rowwise=True)


def solver_of(sampler: str, table: SolverTable | None, num_steps: int) -> Sampler:
    """The sampler by a name, or a learned solver in its place.

    Raises:
        ValueError: an unknown sampler, one that is no table, or a table of another number of steps.
    """
    if table is None:
        return get_sampler(sampler)
    check_solver(sampler, table, num_steps)
    return table.sampler(sampler)


def check_solver(sampler: str, table: SolverTable, num_steps: int) -> None:
    """Raises: ValueError, as `solver_of`."""
    _check_is_table(get_sampler(sampler))
    if table.num_steps != num_steps:
        raise ValueError(f"solver_table has {table.num_steps} rows; accepted: {num_steps}, one per step")


def _step_by_lag(step: Step, numbers: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """x_s and x0 by one row of a table, as `SolverTable.by_lag` has it: numbers, or tensors shaped to multiply x."""
    a, b_now, *b_before = numbers
    x0 = step.predict(step.x_t, step.t).x0
    x_s = a * step.x_t + b_now * x0
    for b_ij, past in zip(reversed(b_before), step.history, strict=True):
        x_s = x_s + b_ij * past.x0
    return x_s, x0


def _check_is_table(sampler: Sampler) -> None:
    """Raises: ValueError."""
    if not sampler.facts.is_table:
        accepted = "one without noise that calls the network once per step"
        raise ValueError(f"sampler is {sampler.name!r}; accepted, as a table: {accepted}")


def _step_on_vectors(
    sampler: Sampler,
    noise_schedule: NoiseSchedule,
    x: Tensor,
    x0: Tensor,
    t: Tensor,
    s: Tensor,
    history: tuple[Past, ...],
) -> tuple[Tensor, Tensor]:
    """x_s, and the x0 to remember, where the network predicts `x0`; all `(K, num_steps + 1)`, times `(K,)`."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        level = NoiseLevel.at(noise_schedule, t, x)
        return Prediction(x0, 1 / level.sigma * (x - level.alpha * x0))

    def no_noise() -> Tensor:
        raise AssertionError(f"the sampler {sampler.name!r} draws noise")

    return sampler.update(Step(predict, noise_schedule, x, t, s, history, no_noise, 0.0))
