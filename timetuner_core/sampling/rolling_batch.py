"""Sampling many requests at once, each at its own step: who is done leaves, and who comes joins at the next step."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from timetuner_core.models.loading import DiffusionModel
from timetuner_core.samplers import (
    Past,
    SamplerStep,
    adds_noise,
    get_sampler,
    initial_noise,
    step_noise,
    with_history,
)
from timetuner_core.sampling.generate import UNGUIDED_SCALES, Guidance, batches


@dataclass(frozen=True)
class Row:
    """A sample to make.

    Attributes:
        owner: whose it is. seed: decides its noise.
        timesteps: `(num_steps + 1,)`, float64, falling. t_ratios: `(num_steps,)`, float64.
        condition, uncond_condition: one row each, without the batch's dimension; None where there is none.
    """

    owner: Hashable
    seed: int
    timesteps: Tensor
    t_ratios: Tensor
    guidance_scale: float = 1.0
    condition: Tensor | None = None
    uncond_condition: Tensor | None = None

    @property
    def num_steps(self) -> int:
        return len(self.t_ratios)


@dataclass
class Travelling:
    """A row on its way: how many steps it has made, and where its noise comes from.

    Attributes:
        times: t, s and t_ratio of each step; as numbers, since taking three elements of tensors for each row and step
            would take half of a step's time without the network.
    """

    row: Row
    generator: torch.Generator
    step: int = 0
    times: list[tuple[float, float, float]] = field(init=False)

    def __post_init__(self) -> None:
        timesteps, t_ratios = self.row.timesteps.tolist(), self.row.t_ratios.tolist()
        self.times = list(zip(timesteps[:-1], timesteps[1:], t_ratios, strict=True))


@dataclass(frozen=True)
class Advance:
    """The result of a step: the owners' rows that are done, in the order they joined, with images
    `(len(done), *image_shape)`; and every row's step and predicted x0 `(rows, *sample_shape)`."""

    done: list[Row]
    images: Tensor | None
    travelling: list[Travelling]
    x0: Tensor


@dataclass
class RollingBatch:
    """Rows of one model, sampler and kind of guidance, moved on together: by one network batch per step if one holds
    them all.

    A row's bits depend on its request alone, not on its company: batches are padded to one of `batch_sizes`, between
    which the network's rows do not differ (see `batching.steady_sizes`).

    Attributes:
        guidance: its scale is each row's own; guided and unguided rows do not mix.
        batch_sizes: rising. capacity: the most rows it holds; default the largest batch size.
    """

    model: DiffusionModel
    sampler: str
    guidance: Guidance
    eta: float
    batch_sizes: Sequence[int]
    device: torch.device | str = "cpu"
    capacity: int | None = None
    rows: list[Travelling] = field(default_factory=list)
    x: Tensor | None = None
    history: tuple[Past, ...] = ()

    @property
    def room(self) -> int:
        """How many rows may join now. Rows of samplers that remember, or look at where all are, start together."""
        capacity = self.batch_sizes[-1] if self.capacity is None else self.capacity
        return capacity - len(self.rows) if self.mixes_steps or not self._started else 0

    @property
    def mixes_steps(self) -> bool:
        return get_sampler(self.sampler).rowwise and self.guidance.interval is None

    @property
    def _started(self) -> bool:
        return any(travelling.step > 0 for travelling in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Have rows join, at their first step.

        Raises:
            ValueError: more than there is room for, or with another grid where all must have the same.
        """
        if len(rows) > self.room:
            raise ValueError(f"{len(rows)} rows are to join; accepted: up to {self.room}")
        grids = [*(travelling.row.timesteps for travelling in self.rows), *(row.timesteps for row in rows)]
        if not self.mixes_steps and any(not torch.equal(grid, grids[0]) for grid in grids):
            raise ValueError("rows of different timesteps are to start together; accepted: one grid")
        noise, generators = [], []
        for row in rows:
            std = self.model.noise_schedule.starting_std(row.timesteps[0])
            x_T, (generator,) = initial_noise(self.model.sample_shape, [row.seed], std)
            noise.append(x_T)
            generators.append(generator)
        joining = torch.cat(noise).to(self.device)
        self.x = joining if self.x is None else torch.cat([self.x, joining])
        self.rows += [Travelling(row, generator) for row, generator in zip(rows, generators, strict=True)]

    def discard(self, owner: Hashable) -> None:
        """Take an owner's rows out; where all started together they go on, unseen, until the end."""
        if self.mixes_steps:
            self._keep([k for k, travelling in enumerate(self.rows) if travelling.row.owner != owner])

    @torch.no_grad()
    def step(self) -> Advance:
        """Move every row on by one step of its own."""
        assert self.x is not None
        parts = [self._move(index, count) for index, count in batches(len(self.rows), self.batch_sizes)]
        x_s, x0 = (torch.cat(part) for part in zip(*parts, strict=True))
        if length := get_sampler(self.sampler).history_length:
            # Only multistep samplers have a history; their rows all start together, so row 0's time is every row's.
            first = self.rows[0]
            past = Past(first.row.timesteps[first.step], self.x, x0)
            self.history = (*self.history, past)[-length:]
        self.x = x_s
        for travelling in self.rows:
            travelling.step += 1
        return self._advance(x0)

    def _move(self, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """x_s and x0 of the rows at `index`, of which the first `count` are wanted."""
        assert self.x is not None
        here = index.to(self.x.device)
        step_fn, x = self._step_fn(index), self.x[here]
        history = tuple(Past(past.t, past.x[here], past.x0[here]) for past in self.history)
        kwargs: dict[str, Any] = {**self._conditions(index), **with_history(step_fn, history)}
        noise = self._noise(x, index[:count]) if adds_noise(step_fn, self.eta) else None
        x_s, x0 = step_fn(x, *self._times(index), self.eta, noise, **kwargs)
        return x_s[:count], x0[:count]

    def _advance(self, x0: Tensor) -> Advance:
        travelling = list(self.rows)
        over = [k for k, row in enumerate(travelling) if row.step == row.row.num_steps]
        if not over:
            return Advance([], None, travelling, x0)
        assert self.x is not None
        images = decode(self.model, self.x[torch.tensor(over)], self.batch_sizes)
        self._keep([k for k in range(len(travelling)) if k not in set(over)])
        return Advance([travelling[k].row for k in over], images, travelling, x0)

    def _keep(self, index: list[int]) -> None:
        assert self.x is not None
        self.x = self.x[torch.tensor(index, dtype=torch.long)]
        self.rows = [self.rows[k] for k in index]
        if not self.rows:
            self.x, self.history = None, ()

    def _times(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and t_ratio, `(B,)`; t and s `()` where all rows are at the same step."""
        at = [travelling.times[travelling.step] for travelling in self.rows]
        t, s, t_ratio = torch.tensor(at, dtype=torch.float64).unbind(1)
        if not self.mixes_steps:
            return t[0], s[0], t_ratio[index]
        return t[index], s[index], t_ratio[index]

    def _step_fn(self, index: Tensor) -> SamplerStep:
        """Guided by the rows' scales; or plainly unguided, which takes fewer calls."""
        guidance = self.guidance
        scales = [travelling.row.guidance_scale for travelling in self.rows]
        scale: float | Tensor = scales[0]
        if guidance.type != "uncond" and any(scale != UNGUIDED_SCALES[guidance.type] for scale in scales):
            scale = torch.tensor(scales, dtype=torch.float64)[index].to(self.device)
        model_fn = self.model.model_fn(guidance.type, scale, guidance.rescale, guidance.interval)
        return get_sampler(self.sampler).step_fn(model_fn, self.model.noise_schedule)

    def _conditions(self, index: Tensor) -> dict[str, Tensor | None]:
        rows = [self.rows[k].row for k in index.tolist()]
        condition = _stack([row.condition for row in rows], self.device)
        conditions = self.model.conditions(self.guidance.type, condition)
        uncond = _stack([row.uncond_condition for row in rows], self.device)
        return conditions if uncond is None else {**conditions, "uncond_condition": uncond}

    def _noise(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Each row's own; the padding's does not matter."""
        drawn = step_noise(x[: len(wanted)], [self.rows[k].generator for k in wanted.tolist()])
        return torch.cat([drawn, torch.zeros_like(x[len(wanted) :])])


def decode(model: DiffusionModel, x: Tensor, batch_sizes: Sequence[int]) -> Tensor:
    """Images of latents, at the network's batch sizes."""
    parts = batches(len(x), batch_sizes)
    return torch.cat([model.decode(x[index.to(x.device)])[:count] for index, count in parts])


def _stack(values: list[Tensor | None], device: torch.device | str) -> Tensor | None:
    """All rows' values, or None if they have none."""
    given = [value for value in values if value is not None]
    return torch.stack(given).to(device) if given else None
