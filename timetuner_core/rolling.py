"""Sampling many requests at once, each at its own step: who is done leaves, and who comes joins at the next step."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from timetuner_core.generation import UNGUIDED_SCALES, Guidance
from timetuner_core.loading import DiffusionModel
from timetuner_core.model_wrapper import GuidedModel
from timetuner_core.samplers import Past, adds_noise, get_sampler, initial_noise, remember, step_noise, with_history


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
    """A row on its way: how many steps it has made, and where its noise comes from."""

    row: Row
    generator: torch.Generator
    step: int = 0


@dataclass(frozen=True)
class Advance:
    """What a step brought: the owners' rows that are done, in the order they joined, with images
    `(len(done), *image_shape)`; and every row's step and predicted x0 `(rows, *sample_shape)`."""

    done: list[Row]
    images: Tensor | None
    travelling: list[Travelling]
    x0: Tensor


@dataclass
class RollingBatch:
    """Rows of one model, sampler and kind of guidance, moved on by one network batch per step.

    A row's bits depend on its request alone, not on its company: batches are padded to one of `batch_sizes`, between
    which the network's rows do not differ (see `batching.steady_sizes`).

    Attributes:
        guidance: its scale is each row's own; guided and unguided rows do not mix.
        batch_sizes: rising; the last is the most rows it holds.
    """

    model: DiffusionModel
    sampler: str
    guidance: Guidance
    eta: float
    batch_sizes: Sequence[int]
    device: torch.device | str = "cpu"
    rows: list[Travelling] = field(default_factory=list)
    x: Tensor | None = None
    history: tuple[Past, ...] = ()

    @property
    def room(self) -> int:
        """How many rows may join now. Rows of samplers that remember, or look at where all are, start together."""
        return self.batch_sizes[-1] - len(self.rows) if self.mixes_steps or not self._started else 0

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
        count, size = len(self.rows), padded(len(self.rows), self.batch_sizes)
        index = torch.arange(size).clamp(max=count - 1)
        x = self.x[index.to(self.x.device)]
        t, s, t_ratio = self._times(index)
        step_fn = get_sampler(self.sampler).step_fn(self._model_fn(), self.model.noise_schedule)
        kwargs: dict[str, Any] = {**self._conditions(index), **with_history(step_fn, self.history)}
        noise = self._noise(x) if adds_noise(step_fn, self.eta) else None
        x_s, x0 = step_fn(x, t, s, t_ratio, self.eta, noise, **kwargs)
        self.history = remember(step_fn, self.history, Past(t, x, x0))
        self.x = x_s[:count]
        for travelling in self.rows:
            travelling.step += 1
        return self._advance(x0[:count])

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
        at = [(r.row.timesteps[r.step], r.row.timesteps[r.step + 1], r.row.t_ratios[r.step]) for r in self.rows]
        t, s, t_ratio = (torch.stack(times) for times in zip(*at, strict=True))
        if not self.mixes_steps:
            return t[0], s[0], t_ratio[index]
        return t[index], s[index], t_ratio[index]

    def _model_fn(self) -> GuidedModel:
        """Guided by the rows' scales, padded; or plainly unguided, which takes fewer calls."""
        guidance = self.guidance
        scales = [travelling.row.guidance_scale for travelling in self.rows]
        scale: float | Tensor = scales[0]
        if guidance.type != "uncond" and any(scale != UNGUIDED_SCALES[guidance.type] for scale in scales):
            index = torch.arange(padded(len(scales), self.batch_sizes)).clamp(max=len(scales) - 1)
            scale = torch.tensor(scales, dtype=torch.float64)[index].to(self.device)
        return self.model.model_fn(guidance.type, scale, guidance.rescale, guidance.interval)

    def _conditions(self, index: Tensor) -> dict[str, Tensor | None]:
        rows = [self.rows[int(k)].row for k in index]
        condition = _stack([row.condition for row in rows], self.device)
        conditions = self.model.conditions(self.guidance.type, condition)
        uncond = _stack([row.uncond_condition for row in rows], self.device)
        return conditions if uncond is None else {**conditions, "uncond_condition": uncond}

    def _noise(self, x: Tensor) -> Tensor:
        """Each row's own; the padding's does not matter."""
        drawn = step_noise(x[: len(self.rows)], [travelling.generator for travelling in self.rows])
        return torch.cat([drawn, torch.zeros_like(x[len(self.rows) :])])


def padded(count: int, batch_sizes: Sequence[int]) -> int:
    """The least of some rising sizes that holds so many."""
    return next(size for size in batch_sizes if size >= count)


def decode(model: DiffusionModel, x: Tensor, batch_sizes: Sequence[int]) -> Tensor:
    """Images of latents, the batch padded as the network's."""
    index = torch.arange(padded(len(x), batch_sizes), device=x.device).clamp(max=len(x) - 1)
    return model.decode(x[index])[: len(x)]


def _stack(values: list[Tensor | None], device: torch.device | str) -> Tensor | None:
    """All rows' values, or None if they have none."""
    given = [value for value in values if value is not None]
    return torch.stack(given).to(device) if given else None
