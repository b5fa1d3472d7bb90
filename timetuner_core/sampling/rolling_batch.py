"""Sampling many requests at once, each at its own step: who is done leaves, and who comes joins at the next step."""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from timetuner_core.models.loading import DiffusionModel
from timetuner_core.models.out_of_memory import is_out_of_memory
from timetuner_core.samplers import (
    Past,
    Sampler,
    SamplerStep,
    get_sampler,
    initial_noise,
    step_noise,
    with_history,
)
from timetuner_core.samplers.solver_table import SolverTable, sampler_of_rows
from timetuner_core.sampling.generate import UNGUIDED_SCALES, Guidance, batches
from timetuner_core.sampling.known_levels import KnownLevels, levels_of_steps

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A sample to make.

    Attributes:
        owner: whose it is. seed: decides its noise.
        timesteps: `(num_steps + 1,)`, float64, falling. t_ratios: `(num_steps,)`, float64.
        solver_table: a learned solver's coefficients, in batches that are `learned`.
        condition, uncond_condition: one row each, without the batch's dimension; None where there is none.
    """

    owner: Hashable
    seed: int
    timesteps: Tensor
    t_ratios: Tensor
    guidance_scale: float = 1.0
    condition: Tensor | None = None
    uncond_condition: Tensor | None = None
    solver_table: SolverTable | None = None

    @property
    def num_steps(self) -> int:
        return len(self.t_ratios)

    @property
    def call_times(self) -> Tensor:
        """The grid, and the times of a table's calls where it has some: rows that start together share both."""
        times = None if self.solver_table is None else self.solver_table.times
        return self.timesteps if times is None else torch.cat([self.timesteps, times])


@dataclass
class Travelling:
    """A row on its way: how far it is, and where its noise comes from.

    Attributes:
        levels: the numbers of each update, as `levels_of_steps` has them: taking elements of tensors for each row and
            step would take half of a step's time without the network.
        updates_per_step: more than one for a learned solver that calls the network several times per step.
        num_made: how many updates it has made.
        by_lag: the numbers of each update of a learned solver, as `SolverTable.by_lag` has them.
    """

    row: Row
    generator: torch.Generator
    levels: list[tuple[float, ...]]
    updates_per_step: int = 1
    num_made: int = 0
    by_lag: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_lag = [] if self.row.solver_table is None else self.row.solver_table.by_lag

    @property
    def num_updates(self) -> int:
        return len(self.levels)

    @property
    def step(self) -> int:
        """How many steps it has made."""
        is_over = self.num_made == self.num_updates
        return self.num_steps if is_over else self.num_made // self.updates_per_step

    @property
    def num_steps(self) -> int:
        return self.row.num_steps


class Numbers(NamedTuple):
    """The numbers that a step needs of each row, `(B,)`, float64: see `levels_of_steps`."""

    t: Tensor
    s: Tensor
    t_ratio: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    alpha_s: Tensor
    sigma_s: Tensor
    guidance_scale: Tensor


@dataclass(frozen=True)
class Advance:
    """The result of a step: the owners' rows that are done, in the order they joined, with images
    `(len(done), *image_shape)`; every other row's step and predicted x0 `(rows, *sample_shape)`; and the rows that
    failed, each with its error."""

    done: list[Row]
    images: Tensor | None
    travelling: list[Travelling]
    x0: Tensor
    failed: list[tuple[Row, Exception]] = field(default_factory=list)
    flagged: list[bool] = field(default_factory=list)  # No network has a safety checker.


class NoBatchFitsError(Exception):
    """The memory does not hold the smallest batch."""


@dataclass
class RollingBatch:
    """Rows of one model, sampler and kind of guidance, moved on together: by one network batch per step if one holds
    them all.

    Batches are padded to one of `batch_sizes`. Where the network's rows do not differ between these, which
    `same_bits.steady_sizes` finds, a row's bits depend on its request alone. Otherwise they also depend on its company.

    Where a network batch raises an error, its halves are tried, down to single rows: only rows that fail alone have
    failed. Where memory runs out, the batch size that was too large is removed from `batch_sizes`.

    Attributes:
        guidance: its scale is each row's own; guided and unguided rows do not mix.
        learned: whether each row has a solver of its own in the sampler's place. Such rows may be at any step.
        batch_sizes: rising. capacity: the most rows it holds; default the largest batch size.
        on_smaller_sizes: called with the batch sizes that are left when memory ran out.
    """

    model: DiffusionModel
    sampler: str | Sampler
    guidance: Guidance
    eta: float
    batch_sizes: Sequence[int]
    device: torch.device | str = "cpu"
    capacity: int | None = None
    on_smaller_sizes: Callable[[Sequence[int]], None] = lambda sizes: None
    learned: bool = False
    rows: list[Travelling] = field(default_factory=list)
    x: Tensor | None = None
    history: tuple[Past, ...] = ()
    _condition: Tensor | None = None
    _uncond: Tensor | None = None

    @property
    def room(self) -> int:
        """How many rows may join now. Rows of samplers that remember, or look at where all are, start together."""
        capacity = self.batch_sizes[-1] if self.capacity is None else self.capacity
        return capacity - len(self.rows) if self.mixes_steps or not self._started else 0

    @property
    def num_leaving(self) -> int:
        """How many rows are done after the next step."""
        return sum(travelling.num_made + 1 == travelling.num_updates for travelling in self.rows)

    @property
    def mixes_steps(self) -> bool:
        return (self.learned or get_sampler(self.sampler).rowwise) and self.guidance.interval is None

    @property
    def _started(self) -> bool:
        return any(travelling.num_made > 0 for travelling in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Have rows join, at their first step.

        Raises:
            ValueError: more than there is room for, with another grid where all must have the same, or with a solver
                of their own where none has one.
        """
        if len(rows) > self.room:
            raise ValueError(f"{len(rows)} rows are to join; accepted: up to {self.room}")
        grids = [*(travelling.row.call_times for travelling in self.rows), *(row.call_times for row in rows)]
        if not self.mixes_steps and any(not torch.equal(grid, grids[0]) for grid in grids):
            raise ValueError("rows of different timesteps are to start together; accepted: one grid")
        if any((row.solver_table is not None) != self.learned for row in rows):
            raise ValueError(f"rows with and without a solver_table; accepted: {'with' if self.learned else 'without'}")
        noise, generators = [], []
        for row in rows:
            std = self.model.noise_schedule.starting_std(row.timesteps[0])
            x_T, (generator,) = initial_noise(self.model.sample_shape, [row.seed], std)
            noise.append(x_T)
            generators.append(generator)
        joining = torch.cat(noise).to(self.device)
        self.x = joining if self.x is None else torch.cat([self.x, joining])
        # Rows that join have no earlier steps: what stands in their place is multiplied by 0.
        nothing = torch.zeros_like(joining)
        self.history = tuple(
            past._replace(x=torch.cat([past.x, nothing]), x0=torch.cat([past.x0, nothing])) for past in self.history
        )
        self._condition = _joined(self._condition, [row.condition for row in rows], self.device)
        self._uncond = _joined(self._uncond, [row.uncond_condition for row in rows], self.device)
        schedule, sampler = self.model.noise_schedule, get_sampler(self.sampler)
        for row, generator in zip(rows, generators, strict=True):
            solver = sampler if row.solver_table is None else row.solver_table.sampler(sampler.name)
            levels = levels_of_steps(schedule, *solver.in_calls(row.timesteps, row.t_ratios))
            self.rows.append(Travelling(row, generator, levels, solver.updates_per_step))

    def discard(self, owner: Hashable) -> None:
        """Take an owner's rows out; where all started together they go on, unseen, until the end."""
        if self.mixes_steps:
            self._keep([k for k, travelling in enumerate(self.rows) if travelling.row.owner != owner])

    @torch.no_grad()
    def step(self) -> Advance:
        """Move every row on by one step of its own; by one network call, with a learned solver of several per step."""
        assert self.x is not None
        noise = self._noise(self.x)
        moved, errors = self._in_batches(len(self.rows), lambda index, count: self._move(index, count, noise))
        failed = self._remove(errors)
        if not moved:
            return Advance([], None, [], torch.empty(0), failed)
        x_s, x0 = moved[0] if len(moved) == 1 else (torch.cat(part) for part in zip(*moved, strict=True))
        if length := self._history_length:
            # Rows of multistep samplers start together, so row 0's time is every row's. Learned solvers need no times.
            first = self.rows[0]
            past = Past(torch.tensor(first.levels[first.num_made][0], dtype=torch.float64), self.x, x0)
            self.history = (*self.history, past)[-length:]
        self.x = x_s
        for travelling in self.rows:
            travelling.num_made += 1
        return self._advance(x0, failed)

    def close(self) -> None:
        """Take all rows out."""
        self._keep([])

    def preview(self, advance: Advance, rows: Sequence[int]) -> Tensor:
        """The predictions of the last step for some travelling rows, as images. Raises: as `decode`."""
        return self.decode(advance.x0[torch.tensor(rows)])

    def decode(self, x: Tensor) -> Tensor:
        """Images of latents, at the network's batch sizes. Raises: the error of the first that cannot be decoded."""
        images, errors = self._decode(x)
        for error in errors.values():
            raise error
        return torch.cat(images)

    def _decode(self, x: Tensor) -> tuple[list[Tensor], dict[int, Exception]]:
        return self._in_batches(len(x), lambda index, count: self.model.decode(x[index.to(x.device)])[:count])

    def _in_batches(self, count: int, run: Callable[[Tensor, int], T]) -> tuple[list[T], dict[int, Exception]]:
        """Run something for so many rows in batches, and where one fails, for its halves.

        Args:
            run: is given the batch's indices `(B,)`, and how many of them it is for, as `batches` gives them.

        Returns:
            The results, by rising rows, and the errors of the rows that failed alone, by their indices.
        """
        results: list[T] = []
        errors: dict[int, Exception] = {}
        waiting = [(0, count)]
        while waiting:
            start, end = waiting.pop()
            if end - start > self.batch_sizes[-1]:
                middle = start + self.batch_sizes[-1]
                waiting += [(middle, end), (start, middle)]
                continue
            ((index, held),) = batches(end - start, self.batch_sizes)
            try:
                results.append(run(start + index if start else index, held))
                continue
            except Exception as error:  # Networks, samplers and devices have errors of their own.
                failure = error
            if is_out_of_memory(failure):
                failure.__traceback__ = None  # Its frames hold the tensors that took the memory.
                if self._use_smaller_batches(len(index)):
                    waiting.append((start, end))
                    continue
                accepted = "a smaller SAMPLE_BATCH_SIZE, SAME_BITS=false, or a device with more memory"
                message = f"memory does not hold a batch of {len(index)}; accepted: {accepted}; {failure}"
                errors |= dict.fromkeys(range(start, end), NoBatchFitsError(message))
            elif end - start == 1:
                errors[start] = failure
            else:
                middle = (start + end) // 2
                waiting += [(middle, end), (start, middle)]
        return results, errors

    def _use_smaller_batches(self, size: int) -> bool:
        """Use only batch sizes below `size` from now on. Returns whether there are any."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = [known for known in self.batch_sizes if known < size]
        if smaller:
            logger.warning("memory does not hold a batch of %d; from now on they have up to %d", size, smaller[-1])
            self.batch_sizes = smaller
            self.on_smaller_sizes(smaller)
        return bool(smaller)

    def _move(self, index: Tensor, count: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_s and x0 of the rows at `index`, of which the first `count` are wanted.

        Args:
            noise: of all rows, `(rows, *sample_shape)`. The rows that fill the batch up repeat the last one's.
        """
        assert self.x is not None
        is_whole = len(index) == count == len(self.rows)  # Most steps have all rows in one batch, without any more.
        here = None if is_whole else index.to(self.x.device)
        numbers = self._numbers(index)
        step_fn, x = self._step_fn(index, numbers), _rows_at(self.x, here)
        history = tuple(Past(past.t, _rows_at(past.x, here), _rows_at(past.x0, here)) for past in self.history)
        kwargs: dict[str, Any] = {**self._conditions(here), **with_history(step_fn, history)}
        noise = None if noise is None else _rows_at(noise, here)
        x_s, x0 = step_fn(x, *self._times(numbers), self.eta, noise, **kwargs)
        return (x_s, x0) if is_whole else (x_s[:count], x0[:count])

    def _advance(self, x0: Tensor, failed: list[tuple[Row, Exception]]) -> Advance:
        travelling = list(self.rows)
        over = [k for k, row in enumerate(travelling) if row.num_made == row.num_updates]
        if not over:
            return Advance([], None, travelling, x0, failed)
        assert self.x is not None
        images, errors = self._decode(self.x[torch.tensor(over)])
        failed = [*failed, *((travelling[over[k]].row, error) for k, error in errors.items())]
        self._keep([k for k in range(len(travelling)) if k not in set(over)])
        done = [travelling[k].row for i, k in enumerate(over) if i not in errors]
        return Advance(done, torch.cat(images) if images else None, travelling, x0, failed)

    def _remove(self, errors: dict[int, Exception]) -> list[tuple[Row, Exception]]:
        """Take rows out that failed. Returns them with their errors."""
        failed = [(self.rows[k].row, errors[k]) for k in sorted(errors)]
        if failed:
            self._keep([k for k in range(len(self.rows)) if k not in errors])
        return failed

    def _keep(self, index: list[int]) -> None:
        if self.x is None:
            return
        kept = torch.tensor(index, dtype=torch.long).to(self.x.device)
        self.x = self.x[kept]
        self._condition = None if self._condition is None else self._condition[kept]
        self._uncond = None if self._uncond is None else self._uncond[kept]
        self.history = tuple(Past(past.t, past.x[kept], past.x0[kept]) for past in self.history)
        self.rows = [self.rows[k] for k in index]
        if not self.rows:
            self.x, self.history, self._condition, self._uncond = None, (), None, None

    @property
    def _history_length(self) -> int:
        if self.learned:
            return max(travelling.num_updates for travelling in self.rows) - 1
        return get_sampler(self.sampler).history_length

    def _numbers(self, index: Tensor) -> Numbers:
        """The numbers of the step at hand. They go to the device together: a copy takes as long as a kernel there."""
        at = [self.rows[k] for k in index.tolist()]
        rows = [(*travelling.levels[travelling.num_made], travelling.row.guidance_scale) for travelling in at]
        numbers = torch.tensor(list(zip(*rows, strict=True)), dtype=torch.float64)
        return Numbers(*(numbers.to(self.device) if self.mixes_steps else numbers).unbind(0))

    def _times(self, numbers: Numbers) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and t_ratio, `(B,)`; t and s `()` where all rows are at the same step."""
        t, s = (numbers.t, numbers.s) if self.mixes_steps else (numbers.t[0], numbers.s[0])
        return t, s, numbers.t_ratio

    def _step_fn(self, index: Tensor, numbers: Numbers) -> SamplerStep:
        """Guided by the rows' scales; or plainly unguided, which takes fewer calls."""
        guidance = self.guidance
        scales = [travelling.row.guidance_scale for travelling in self.rows]
        scale: float | Tensor = scales[0]
        if guidance.type != "uncond" and any(scale != UNGUIDED_SCALES[guidance.type] for scale in scales):
            scale = numbers.guidance_scale.to(self.device)
        model_fn = self.model.model_fn(guidance.type, scale, guidance.rescale, guidance.interval)
        schedule = self.model.noise_schedule
        if self.mixes_steps:
            start = numbers.t, numbers.alpha_t, numbers.sigma_t
            known: Any = KnownLevels(schedule, start, (numbers.s, numbers.alpha_s, numbers.sigma_s))
            model_fn, schedule = replace(model_fn, noise_schedule=known), known
        return self._sampler_of(index).step_fn(model_fn, schedule)

    def _sampler_of(self, index: Tensor) -> Sampler:
        sampler = get_sampler(self.sampler)
        if not self.learned:
            return sampler
        by_lag = [self.rows[k].by_lag[self.rows[k].num_made] for k in index.tolist()]
        return sampler_of_rows(sampler.name, by_lag, len(self.history), self.device)

    def _conditions(self, here: Tensor | None) -> dict[str, Tensor | None]:
        condition = None if self._condition is None else _rows_at(self._condition, here)
        conditions = self.model.conditions(self.guidance.type, condition)
        if self._uncond is None:
            return conditions
        return {**conditions, "uncond_condition": _rows_at(self._uncond, here)}

    def _noise(self, x: Tensor) -> Tensor | None:
        """Each row's noise of this step, drawn once, however often a batch with the row is tried."""
        if not get_sampler(self.sampler).adds_noise(self.eta):
            return None
        return step_noise(x, [travelling.generator for travelling in self.rows])


def _rows_at(rows: Tensor, here: Tensor | None) -> Tensor:
    """The rows at an index, None for all."""
    return rows if here is None else rows[here]


def _joined(there: Tensor | None, values: list[Tensor | None], device: torch.device | str) -> Tensor | None:
    """The rows that are there, and those that join. None if they have none."""
    given = [value for value in values if value is not None]
    if not given:
        return there
    joining = torch.stack(given).to(device)
    return joining if there is None else torch.cat([there, joining])
