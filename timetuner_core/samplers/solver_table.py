"""A deterministic sampler as a table of numbers: `x_{i+1} = a_i x_i + sum_{j <= i} b_ij x0_j`.

`x_i` is the state that the network is called with, and `x0_j` what it predicted, guided, in call j: a table has one row
per call. A sampler with several calls per step has rows for the states between. Its numbers follow from its time grid.
A tuner may change them freely: then the whole solver is learned (BNS, Shaul et al. 2024; S4S, Frankel et al. 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from timetuner_core.clipping import Clipping, keeps_eps
from timetuner_core.coefficients import NoiseLevel
from timetuner_core.guided_model import Prediction, expand_like
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers import Past, Sampler, Step, get_sampler, latest


@dataclass(frozen=True)
class SolverTable:
    """The coefficients of a solver, float64.

    Attributes:
        a: `(num_calls,)`, the factor of x_i in x_{i+1}.
        b: `(num_calls, num_calls)`, the factor of x0_j in x_{i+1}; 0 above the diagonal.
        times: `(num_calls,)`, the time of each call; None for one call per step, which is at the grid's times.
        eps: `(num_calls,)`, the factor in x_{i+1} of the eps predicted in call i, where that does not follow x0, as
            DDIM clips x0 and keeps eps; None elsewhere.

    Tables of several grids may be stacked along a dimension before these.
    """

    a: Tensor
    b: Tensor
    times: Tensor | None = None
    eps: Tensor | None = None

    @classmethod
    def of_sampler(
        cls, sampler: Sampler, noise_schedule: NoiseSchedule, timesteps: Tensor, clipping: Clipping | None = None
    ) -> Self:
        """The table of a sampler on a grid `(num_steps + 1,)`, or on several that end alike, `(K, num_steps + 1)`.

        The sampler is run on unit vectors in place of x_T and of each x0_j.

        Args:
            clipping: the model's, which may give the table a column `eps`.

        Raises:
            ValueError: a sampler that adds noise, or whose calls of the network are not as many as its facts tell.
        """
        _check_is_table(sampler)
        grids = timesteps.double().cpu().reshape(-1, timesteps.shape[-1])
        run = _run_on_units(sampler, noise_schedule, grids, keeps_eps=keeps_eps(sampler.name, clipping))
        num_calls, shape = len(run.times), timesteps.shape[:-1]
        # x_i = A_i x_T + sum_j B_ij x0_j (+ E_ij eps_j), which is rewritten in terms of the call before.
        A, B, E = run.states[..., 0], run.states[..., 1 : num_calls + 1], run.states[..., num_calls + 1 :]
        a = torch.where(A[:, :-1] == 0, 0.0, A[:, 1:] / A[:, :-1])  # A step that forgets x_T has nothing to divide by.
        b = (B[:, 1:] - a[..., None] * B[:, :-1]).tril()
        eps = (E[:, 1:] - a[..., None] * E[:, :-1]).diagonal(dim1=1, dim2=2) if E.shape[-1] else None
        return cls(
            a.reshape(*shape, num_calls),
            b.reshape(*shape, num_calls, num_calls),
            torch.stack(run.times, dim=-1).reshape(*shape, num_calls) if sampler.calls_per_step > 1 else None,
            None if eps is None else eps.reshape(*shape, num_calls),
        )

    @property
    def num_calls(self) -> int:
        return self.a.shape[-1]

    def plus(self, offsets: Tensor) -> "SolverTable":
        """The table with offsets `(..., num_calls, num_calls + 1)` added: column 0 to `a`, the rest to `b`."""
        return replace(self, a=self.a + offsets[..., 0], b=self.b + offsets[..., 1:].tril())

    def sampler(self, name: str) -> Sampler:
        """The sampler that makes these calls, one after the other from the first; x0 is clipped as `name` clips it.

        Where `name` calls the network several times per step, each call is a step of its own: `Sampler.in_calls`.
        """
        rows = self.by_lag

        def update(step: Step) -> tuple[Tensor, Tensor]:
            a, eps, *b = rows[len(step.history)]
            return _make_call(step, a, eps or None, b)

        if self.times is None:
            return Sampler(name, update, order=1, history_length=self.num_calls)
        return Sampler(
            name,
            update,
            order=1,
            calls_per_step=get_sampler(name).calls_per_step,
            history_length=self.num_calls,
            call_times=tuple(self.times.tolist()),
        )

    @cached_property
    def by_lag(self) -> list[list[float]]:
        """The numbers of each call i: `a_i, eps_i, b_ii, b_i,i-1, ..., b_i0`."""
        eps = torch.zeros_like(self.a) if self.eps is None else self.eps
        rows = zip(self.a.tolist(), eps.tolist(), self.b.tolist(), strict=True)
        return [[a, of_eps, *row[i::-1]] for i, (a, of_eps, row) in enumerate(rows)]

    def where_eps_follows(self, alpha: Tensor, sigma: Tensor) -> "SolverTable":
        """The table without its column `eps`, for x0 that is not clipped: there `eps = (x - alpha x0) / sigma`.

        Args:
            alpha, sigma: at each call, `(num_calls,)`.
        """
        if self.eps is None:
            return self
        of_x = self.eps / sigma
        return SolverTable(self.a + of_x, self.b - torch.diag(of_x * alpha), self.times)

    def to_dict(self) -> dict[str, Any]:
        """Lists of numbers; `b` without what is above the diagonal, and no `times` or `eps` where there are none."""
        optional = {"times": self.times, "eps": self.eps}
        return {
            "a": self.a.tolist(),
            "b": [row[: i + 1] for i, row in enumerate(self.b.tolist())],
            **{name: values.tolist() for name, values in optional.items() if values is not None},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The table that `to_dict` wrote.

        Raises:
            ValueError: rows of other lengths, or a number that is not finite.
        """
        a, rows = values["a"], values["b"]
        if len(rows) != len(a) or any(len(row) != i + 1 for i, row in enumerate(rows)):
            raise ValueError(f"table has rows of {[len(row) for row in rows]}; accepted: 1 to {len(a)}, one per step")
        optional = {name: given for name in ("times", "eps") if (given := values.get(name)) is not None}
        for name, given in optional.items():
            if len(given) != len(a):
                raise ValueError(f"table has {len(given)} numbers as {name}; accepted: {len(a)}, one per row")
        b = [[*row, *[0.0] * (len(a) - len(row))] for row in rows]
        tensors = {name: torch.tensor(each, dtype=torch.float64) for name, each in {"a": a, "b": b, **optional}.items()}
        if not all(bool(torch.isfinite(each).all()) for each in tensors.values()):
            raise ValueError("table has a number that is not finite; accepted: finite ones")
        return cls(**tensors)


def sampler_of_rows(name: str, rows: Sequence[Sequence[float]], num_past: int, device: torch.device | str) -> Sampler:
    """The sampler that makes a call of another table with each sample of a batch, or another call of it.

    Args:
        rows: each sample's numbers for its call, as `SolverTable.by_lag` has them.
        num_past: how many calls the batch remembers. Where a sample had fewer, the others are multiplied by 0.
    """
    has_eps = any(eps != 0 for _, eps, *_ in rows)
    padded = [[a, *([eps] if has_eps else []), *b, *[0.0] * (1 + num_past - len(b))] for a, eps, *b in rows]
    numbers = torch.tensor(padded, dtype=torch.float64).to(device)

    def update(step: Step) -> tuple[Tensor, Tensor]:
        x_t = step.x_t
        a, *others = (expand_like(each, x_t) for each in numbers.to(x_t.device, x_t.dtype).unbind(1))
        eps = others.pop(0) if has_eps else None
        return _make_call(step, a, eps, others)

    return Sampler(name, update, order=1, history_length=num_past, rowwise=True)


def solver_of(sampler: str, table: SolverTable | None, timesteps: Tensor) -> Sampler:
    """The sampler by a name, or a learned solver in its place, for a grid `(num_steps + 1,)`.

    Raises:
        ValueError: an unknown sampler, one that is no table, or a table whose calls are not those of the grid.
    """
    if table is None:
        return get_sampler(sampler)
    check_solver(sampler, table, timesteps)
    return table.sampler(sampler)


def check_solver(sampler: str, table: SolverTable, timesteps: Tensor) -> None:
    """Raises: ValueError, as `solver_of`."""
    known, grid = get_sampler(sampler), timesteps.tolist()
    _check_is_table(known)
    if table.num_calls != (num_calls := known.facts.network_calls(grid)):
        raise ValueError(f"solver_table has {table.num_calls} rows; accepted: {num_calls}, one per network call")
    if accepted := known.facts.accepted_call_times(None if table.times is None else table.times.tolist(), grid):
        raise ValueError(f"solver_table has other times; accepted: {accepted}")


def _make_call(step: Step, a: Any, of_eps: Any, b_by_lag: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The next state and x0 by one row of a table: numbers, or tensors shaped to multiply x; of_eps may be None."""
    b_now, *b_before = b_by_lag
    x0, eps = step.predict(step.x_t, step.t)
    x_s = a * step.x_t + b_now * x0
    if of_eps is not None:
        x_s = x_s + of_eps * eps
    for b_ij, past in zip(reversed(b_before), step.history, strict=True):
        x_s = x_s + b_ij * past.x0
    return x_s, x0


def _check_is_table(sampler: Sampler) -> None:
    """Raises: ValueError."""
    if not sampler.facts.is_table:
        raise ValueError(f"sampler is {sampler.name!r}; accepted, as a table: one without noise")


class _UnitRun(NamedTuple):
    """A run of a sampler on unit vectors, on K grids.

    Attributes:
        states: what each call was made with, and the end, `(K, num_calls + 1, 1 + num_calls)`: their parts of x_T and
            of each x0; then those of each eps, where it is kept.
        times: of each call, `(K,)`.
    """

    states: Tensor
    times: list[Tensor]


def _run_on_units(sampler: Sampler, noise_schedule: NoiseSchedule, grids: Tensor, *, keeps_eps: bool) -> _UnitRun:
    """Run a sampler on grids `(K, num_steps + 1)`. Raises: ValueError, if its calls are not as many as it tells."""
    num_calls = sampler.network_calls(grids[0])
    units = torch.eye(1 + num_calls * (2 if keeps_eps else 1), dtype=torch.float64).expand(len(grids), -1, -1)
    states: list[Tensor] = []
    times: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Prediction:
        k = len(states)
        states.append(x)
        times.append(t.expand(len(grids)))
        if k >= num_calls:
            return Prediction(torch.zeros_like(x), torch.zeros_like(x))
        x0 = units[:, 1 + k]
        if keeps_eps:
            return Prediction(x0, units[:, 1 + num_calls + k])
        level = NoiseLevel.at(noise_schedule, t, x)
        return Prediction(x0, 1 / level.sigma * (x - level.alpha * x0))

    def no_noise() -> Tensor:
        raise AssertionError(f"the sampler {sampler.name!r} draws noise")

    x, history = units[:, 0], tuple[Past, ...]()
    for t, s in zip(grids.T[:-1], grids.T[1:], strict=True):
        x_s, x0 = sampler.update(Step(predict, noise_schedule, x, t, s, history, no_noise, 0.0))
        history = latest((*history, Past(t, x, x0)), sampler.history_length)
        x = x_s
    if len(states) != num_calls:
        raise ValueError(f"the sampler {sampler.name!r} makes {len(states)} calls; accepted: {num_calls}, as its facts")
    return _UnitRun(torch.stack([*states, x], dim=1), times)
