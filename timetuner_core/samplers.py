"""Few-step samplers: one-step functions `step_fn(x, t, s, t_ratio=..., ...) -> (x_s, x0)` and their loop."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from timetuner_core.model_wrapper import ModelFn, expand_like
from timetuner_core.noise_schedule import NoiseScheduleVP

Generators = torch.Generator | list[torch.Generator] | None


# One step from time `t` to `s < t`, the network conditioned on `t * t_ratio`:
# `step_fn(x, t, s, t_ratio=..., **step_kwargs) -> (x_s, x0)`, `x` of shape `(B, ...)`, times `()` or `(B,)`.
StepFn: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def ddim_step(
    model_fn: ModelFn,
    noise_schedule: NoiseScheduleVP,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    t_ratio: Tensor | float = 1.0,
    eta: float = 0.0,
    noise: Tensor | None = None,
    generator: Generators = None,
    condition: Tensor | None = None,
    uncond_condition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM step (Song et al. 2021, eq. 12) with `eps = eps_theta(x_t, t * t_ratio)` (TimeTuner, 2024).

    Only the network's conditioning moves: `alpha_t`, `sigma_t` stay at `t`. Differentiable in `t_ratio`.

    Args:
        x: x_t, `(B, ...)`.
        t, s: times of shape `()` or `(B,)`, `s < t`.
        eta: 0 is deterministic, 1 is ancestral (DDPM) sampling.
        noise: what to add if `eta > 0`, of `x`'s shape; else drawn by `generator` (one, or one per sample).

    Returns:
        x_s and the x0 predicted on the way, both of `x`'s shape.
    """
    eps = model_fn(x, t * t_ratio, condition, uncond_condition)
    alpha_t, sigma_t = noise_schedule.marginal_alpha(t), noise_schedule.marginal_std(t)
    alpha_s, sigma_s = noise_schedule.marginal_alpha(s), noise_schedule.marginal_std(s)
    x0 = (x - expand_like(sigma_t, x) * eps) / expand_like(alpha_t, x)
    if eta == 0:
        return expand_like(alpha_s, x) * x0 + expand_like(sigma_s, x) * eps, x0
    sigma_up = eta * (sigma_s / sigma_t) * torch.sqrt(1.0 - (alpha_t / alpha_s) ** 2)
    sigma_down = torch.sqrt((sigma_s**2 - sigma_up**2).clamp(min=0.0))
    if noise is None:
        noise = step_noise(x, generator)
    mean = expand_like(alpha_s, x) * x0 + expand_like(sigma_down, x) * eps
    return mean + expand_like(sigma_up, x) * noise, x0


def step_noise(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise like `x`, `(B, ...)`; from a list of generators, one sample by each.

    Raises:
        ValueError: another number of generators than samples.
    """
    if not isinstance(generator, list):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} samples; accepted: one, or one per sample")
    rows = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generator]
    return torch.stack(rows).to(x.device)


def sample_steps(
    step_fn: StepFn,
    x: Tensor,
    timesteps: Tensor,
    t_ratios: Tensor,
    **step_kwargs: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run `step_fn` over a grid, yielding `(x_s, x0)` after each step.

    Args:
        x: x_T, `(B, ...)`.
        timesteps: `(num_steps + 1,)`, falling. t_ratios: `(num_steps,)`.
    """
    for t, s, t_ratio in zip(timesteps[:-1], timesteps[1:], t_ratios, strict=True):
        x, x0 = step_fn(x, t, s, t_ratio=t_ratio, **step_kwargs)
        yield x, x0


def sample(
    step_fn: StepFn,
    x: Tensor,
    timesteps: Tensor,
    t_ratios: Tensor,
    **step_kwargs: Any,
) -> Tensor:
    """Where `sample_steps` ends: x0, `(B, ...)`."""
    for x_s, _ in sample_steps(step_fn, x, timesteps, t_ratios, **step_kwargs):
        x = x_s
    return x


def initial_noise(shape: tuple[int, ...], seeds: list[int]) -> tuple[Tensor, list[torch.Generator]]:
    """One standard normal sample of `shape` per seed, `(len(seeds), *shape)`, and the generators that go on.

    Drawn on the CPU, so that a seed means the same noise on every device and in every batch.

    Raises:
        ValueError: a seed outside 0..2**32 - 1: torch's CPU generator would use its low 32 bits only.
    """
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; accepted: 0 to {2**32 - 1}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators
