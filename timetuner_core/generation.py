"""Sampling a loaded model in batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timetuner_core.loading import DiffusionModel
from timetuner_core.model_wrapper import GuidanceType
from timetuner_core.samplers import initial_noise
from timetuner_core.time_tuner import TimeTuner


@dataclass(frozen=True)
class Guidance:
    """How the network is guided, and by how much."""

    type: GuidanceType
    scale: float


def generate(
    model: DiffusionModel,
    guidance: Guidance,
    seeds: list[int],
    labels: Tensor | None,
    timesteps: Tensor,
    t_ratios: Tensor | list[float] | None = None,
    eta: float = 0.0,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    after_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """DDIM samples from one seed each, `(len(seeds), *sample_shape)`, on `device`.

    Args:
        labels: `(len(seeds),)`, or None for unguided sampling.
        t_ratios: one per step of `timesteps`; None is untuned.
        after_step: called after each step of each batch; may raise to stop.
    """
    tuner = TimeTuner(model.model_fn(guidance.type, guidance.scale), model.noise_schedule)
    parts = []
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        x_T, generators = initial_noise(model.sample_shape, seeds[rows])
        batch_labels = None if labels is None else labels[rows].to(device)
        conditions: dict[str, Any] = model.conditions(guidance.type, batch_labels)
        x0 = tuner.ddim_sample(
            x_T.to(device),
            timesteps=timesteps,
            t_ratios=t_ratios,
            eta=eta,
            generator=generators,
            callback=lambda *_: after_step(),
            **conditions,
        )
        parts.append(x0)
    return torch.cat(parts)
