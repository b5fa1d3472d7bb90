"""Sampling a loaded model in batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timetuner_core.catalog import GuidanceType
from timetuner_core.guided_model import GuidedModel
from timetuner_core.models.loading import DiffusionModel
from timetuner_core.samplers import Sampler, initial_noise
from timetuner_core.time_tuner import TimeTuner

# Guidance scale at which guidance changes nothing; `uncond` ignores the scale.
UNGUIDED_SCALES: dict[GuidanceType, float] = {"uncond": 1.0, "classifier": 0.0, "classifier-free": 1.0}


@dataclass(frozen=True)
class Guidance:
    """How the network is guided, and by how much."""

    type: GuidanceType
    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    @property
    def guides(self) -> bool:
        """Whether the scale is one that guides."""
        return self.scale != UNGUIDED_SCALES[self.type]

    def model_fn(self, model: DiffusionModel) -> GuidedModel:
        """The model, guided so."""
        return model.model_fn(self.type, self.scale, self.rescale, self.interval)


def generate(
    model: DiffusionModel,
    guidance: Guidance,
    seeds: list[int],
    condition: Tensor | None,
    timesteps: Tensor,
    t_ratios: Tensor | list[float] | None = None,
    eta: float = 0.0,
    *,
    guidance_scales: Sequence[float] | None = None,
    uncond_condition: Tensor | None = None,
    sampler: str | Sampler = "ddim",
    decode: bool = True,
    batch_size: int = 64,
    batch_sizes: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    after_step: Callable[[slice, int, Tensor], None] | None = None,
) -> Tensor:
    """Samples from one seed each, `(len(seeds), *image_shape)`, on `device`.

    Args:
        condition: a class label or tensor per seed, `(len(seeds), ...)`, or None for unguided sampling.
        t_ratios: one per step of `timesteps`; None is untuned.
        guidance_scales: one per seed, in place of `guidance.scale`.
        uncond_condition: `(1, ...)`, in place of the model's own.
        decode: False leaves a latent-diffusion model's samples `(len(seeds), *sample_shape)` in latent space.
        batch_sizes: the only sizes to run the network at, rising, in place of any up to `batch_size`. Batches are of
            the largest, the last one of the least that holds the rest, filled up by repeating its last sample. With
            `batching.steady_sizes`, a seed's sample has the same bits in whatever company.
        after_step: called after each step of each batch with (the batch's slice of the seeds, the step from 1, the
            x0 predicted there `(rows, *sample_shape)`); may raise to stop.

    Raises:
        ValueError: another number of `guidance_scales` than of seeds, or some of them guide and others do not.
    """
    scale = guidance.scale if guidance_scales is None else _one_per_seed(guidance_scales, guidance.type, len(seeds))
    starting_std = model.noise_schedule.starting_std(timesteps[0])

    def sample(index: Tensor, held: int) -> Tensor:
        rows = slice(int(index[0]), int(index[0]) + held)
        x_T, generators = initial_noise(model.sample_shape, [seeds[i] for i in index.tolist()], starting_std)
        conditions: dict[str, Any] = model.conditions(
            guidance.type, None if condition is None else condition[index].to(device)
        )
        if uncond_condition is not None:
            conditions["uncond_condition"] = uncond_condition.to(device)
        batch_scale = scale[index].to(device) if isinstance(scale, Tensor) else scale
        model_fn = model.model_fn(guidance.type, batch_scale, guidance.rescale, guidance.interval)
        x0 = TimeTuner(model_fn, model.noise_schedule).sample(
            x_T.to(device),
            sampler=sampler,
            timesteps=timesteps,
            t_ratios=t_ratios,
            eta=eta,
            generator=generators,
            callback=None if after_step is None else lambda step, _, x0: after_step(rows, step + 1, x0[:held]),
            **conditions,
        )
        return (model.decode(x0) if decode else x0)[:held]

    sizes = range(1, batch_size + 1) if batch_sizes is None else batch_sizes
    return torch.cat([sample(index, held) for index, held in batches(len(seeds), sizes)])


def batches(count: int, batch_sizes: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """The indices `(B,)` of so many rows by batches, each with the number of rows it is for: it is filled up, by its
    last, to the least of some rising sizes that holds them."""
    for start in range(0, count, batch_sizes[-1]):
        held = min(count - start, batch_sizes[-1])
        size = next(size for size in batch_sizes if size >= held)
        yield start + torch.arange(size).clamp(max=held - 1), held


def _one_per_seed(scales: Sequence[float], guidance_type: GuidanceType, count: int) -> float | Tensor:
    """Guidance scales `(count,)`, or one number where none guides, which spares the calls that guidance takes."""
    if len(scales) != count:
        raise ValueError(f"{len(scales)} guidance_scales for {count} seeds; accepted: one per seed")
    unguided = UNGUIDED_SCALES[guidance_type]
    num_unguided = sum(scale == unguided for scale in scales)
    if num_unguided == count:
        return unguided
    if guidance_type != "uncond" and num_unguided > 0:
        raise ValueError(f"guidance_scales has {unguided:g} and others; accepted: all {unguided:g}, or none")
    return torch.tensor(scales, dtype=torch.float64)
