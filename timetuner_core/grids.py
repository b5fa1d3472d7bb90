"""Time grids: `timesteps` of shape `(num_steps + 1,)`, float64, falling from `T`."""

import torch
from torch import Tensor

from timetuner_core.noise_schedule import NoiseScheduleVP


def max_num_steps(noise_schedule: NoiseScheduleVP) -> int | None:
    """The most steps a grid may have: `N` for a network trained on `N` steps, else no limit."""
    return noise_schedule.total_N if noise_schedule.schedule == "discrete" else None


def uniform_timesteps(noise_schedule: NoiseScheduleVP, num_steps: int) -> Tensor:
    """Exactly `num_steps` equal steps from `T` to the schedule's `t_min`.

    Raises:
        ValueError: `num_steps` is below 1, or above `N` for a discrete schedule.
    """
    limit = max_num_steps(noise_schedule)
    if num_steps < 1 or (limit is not None and num_steps > limit):
        accepted = f"1 to {limit}" if limit is not None else "1 or more"
        raise ValueError(f"num_steps is {num_steps}; accepted: {accepted}")
    if limit == 1:  # N = 1: T and t_min coincide, and the only step goes to clean data
        return torch.tensor([noise_schedule.T, 0.0], dtype=torch.float64)
    return torch.linspace(noise_schedule.T, noise_schedule.t_min, num_steps + 1, dtype=torch.float64)


def check_timesteps(noise_schedule: NoiseScheduleVP, timesteps: Tensor | list[float]) -> Tensor:
    """An explicit grid as a float64 tensor.

    Raises:
        ValueError: fewer than two times, times outside `[0, T]`, or not strictly falling.
    """
    grid = torch.as_tensor(timesteps, dtype=torch.float64)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"timesteps has shape {tuple(grid.shape)}; accepted: (num_steps + 1,), at least 2 times")
    inside = bool(((grid >= 0) & (grid <= noise_schedule.T)).all())
    if not inside or not bool((grid[1:] < grid[:-1]).all()):
        raise ValueError(f"timesteps must fall strictly within [0, {noise_schedule.T}]; got {grid.tolist()}")
    return grid


def check_t_ratios(noise_schedule: NoiseScheduleVP, timesteps: Tensor, t_ratios: Tensor | list[float] | None) -> Tensor:
    """One ratio per step as a float64 tensor `(num_steps,)`; all ones if None.

    Raises:
        ValueError: another number of ratios than steps, or conditioning `t * t_ratio` outside `(0, T]`.
    """
    num_steps = len(timesteps) - 1
    if t_ratios is None:
        return timesteps.new_ones(num_steps)
    ratios = torch.as_tensor(t_ratios).to(timesteps)
    if ratios.shape != (num_steps,):
        raise ValueError(f"t_ratios has shape {tuple(ratios.shape)}; accepted: ({num_steps},), one per step")
    conditioning = timesteps[:-1] * ratios
    # Float32 ratios may overshoot T by their rounding, no more.
    if not bool(((conditioning > 0) & (conditioning <= noise_schedule.T * (1 + 1e-6))).all()):
        raise ValueError(f"t * t_ratio must stay within (0, {noise_schedule.T}]; got {conditioning.tolist()}")
    return ratios
