"""Noise levels that were computed before a step, so that the step has little to do beside the network."""

from typing import Any

from torch import Tensor

from timetuner_core.noise_schedule import NoiseSchedule


class KnownLevels:
    """A noise schedule for one step of a batch, which has alpha and sigma at the rows' own times already.

    It answers as the schedule does. At any other time, such as one that a sampler finds between t and s, the schedule
    itself is asked. A time is recognised by where its numbers are in memory: samplers reshape and expand the tensors of
    t and s, and both share the memory of the tensor that was given.

    Args:
        levels: `(times, alpha, sigma)`, each `(B,)`, of t and of s.
    """

    def __init__(self, noise_schedule: NoiseSchedule, *levels: tuple[Tensor, Tensor, Tensor]) -> None:
        self._noise_schedule, self._levels = noise_schedule, levels

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """`alpha_t`."""
        known = self._known(t, 1)
        return self._noise_schedule.marginal_alpha(t) if known is None else known

    def marginal_std(self, t: Tensor) -> Tensor:
        """`sigma_t`."""
        known = self._known(t, 2)
        return self._noise_schedule.marginal_std(t) if known is None else known

    def _known(self, t: Tensor, which: int) -> Tensor | None:
        for level in self._levels:
            times = level[0]
            if t is times or (t.untyped_storage() is times.untyped_storage() and _same_numbers(t, times)):
                return level[which].reshape(t.shape)
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._noise_schedule, name)


def _same_numbers(t: Tensor, times: Tensor) -> bool:
    return (t.storage_offset(), t.numel(), t.dtype) == (times.storage_offset(), times.numel(), times.dtype)


def levels_of_steps(noise_schedule: NoiseSchedule, timesteps: Tensor, t_ratios: Tensor) -> list[tuple[float, ...]]:
    """For each step of a grid t, s, t_ratio, alpha_t, sigma_t, alpha_s and sigma_s, as numbers.

    Args:
        timesteps: `(num_steps + 1,)`, float64. t_ratios: `(num_steps,)`.
    """
    alpha = noise_schedule.marginal_alpha(timesteps).tolist()
    sigma = noise_schedule.marginal_std(timesteps).tolist()
    times = timesteps.tolist()
    columns = (times[:-1], times[1:], t_ratios.tolist(), alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    return list(zip(*columns, strict=True))
