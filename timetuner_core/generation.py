"""Sampling a loaded model in batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timetuner_core.loading import DiffusionModel
from timetuner_core.model_wrapper import GuidanceType, GuidedModel
from timetuner_core.samplers import initial_noise
from timetuner_core.time_tuner import TimeTuner


@dataclass(frozen=True)
class Guidance:
    """How the network is guided, and by how much."""

    type: GuidanceType
    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

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
    uncond_condition: Tensor | None = None,
    sampler: str = "ddim",
    decode: bool = True,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    after_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Samples from one seed each, `(len(seeds), *image_shape)`, on `device`.

    Args:
        condition: a class label or tensor per seed, `(len(seeds), ...)`, or None for unguided sampling.
        t_ratios: one per step of `timesteps`; None is untuned.
        uncond_condition: `(1, ...)`, in place of the model's own.
        decode: False leaves a latent-diffusion model's samples `(len(seeds), *sample_shape)` in latent space.
        after_step: called after each step of each batch; may raise to stop.
    """
    tuner = TimeTuner(guidance.model_fn(model), model.noise_schedule)
    starting_std = model.noise_schedule.starting_std(timesteps[0])
    parts = []
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        x_T, generators = initial_noise(model.sample_shape, seeds[rows], starting_std)
        batch_condition = None if condition is None else condition[rows].to(device)
        conditions: dict[str, Any] = model.conditions(guidance.type, batch_condition)
        if uncond_condition is not None:
            conditions["uncond_condition"] = uncond_condition.to(device)
        x0 = tuner.sample(
            x_T.to(device),
            sampler=sampler,
            timesteps=timesteps,
            t_ratios=t_ratios,
            eta=eta,
            generator=generators,
            callback=lambda *_: after_step(),
            **conditions,
        )
        parts.append(model.decode(x0) if decode else x0)
    return torch.cat(parts)
