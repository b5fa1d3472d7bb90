"""Time grids: `timesteps` of shape `(num_steps + 1,)`, float64, falling from `T`."""

from typing import TypeAlias, get_args

import torch
from torch import Tensor

from timetuner_core.catalog import GridName, NamedGrid
from timetuner_core.noise_schedule import NoiseSchedule

Timesteps: TypeAlias = Tensor | list[float]

EDM_RHO = 7.0


def make_timesteps(noise_schedule: NoiseSchedule, num_steps: int, grid: GridName = "default") -> Tensor:
    """Exactly `num_steps` steps from `T` to the schedule's `t_min`.

    - `default`: the schedule's own, `edm` for EDM, whose t is sigma, else `uniform`.
    - `uniform`: in t.
    - `quadratic`: in the square root of t (DDIM, Song et al. 2021, appendix D.2).
    - `log_snr`: in lambda_t (DPM-Solver, Lu et al. 2022).
    - `edm`: in `(sigma_t / alpha_t)**(1 / 7)` (EDM, Karras et al. 2022, eq. 5).

    Raises:
        ValueError: an unknown `grid`; `num_steps` below 1, or above `N` for a discrete schedule.
    """
    if grid not in get_args(GridName):
        raise ValueError(f"grid is {grid!r}; accepted: {', '.join(get_args(GridName))}")
    limit = noise_schedule.max_num_steps
    if num_steps < 1 or (limit is not None and num_steps > limit):
        accepted = f"1 to {limit}" if limit is not None else "1 or more"
        raise ValueError(f"num_steps is {num_steps}; accepted: {accepted}")
    if limit == 1:  # N = 1: T and t_min coincide, and the only step goes to clean data
        return torch.tensor([noise_schedule.T, 0.0], dtype=torch.float64)
    if grid == "default":
        grid = noise_schedule.default_grid
    ends = torch.tensor([noise_schedule.T, noise_schedule.t_min], dtype=torch.float64)
    return grid_between(noise_schedule, ends, num_steps, grid)


def grid_between(noise_schedule: NoiseSchedule, ends: Tensor, num_steps: int, grid: NamedGrid) -> Tensor:
    """`num_steps` steps between two times `(2,)`, float64, by the formulas of `make_timesteps`."""
    if grid == "uniform":
        timesteps = evenly(ends, num_steps)
    elif grid == "quadratic":
        timesteps = evenly(ends.sqrt(), num_steps).square()
    elif grid == "log_snr":
        timesteps = noise_schedule.inverse_lambda(evenly(noise_schedule.marginal_lambda(ends), num_steps))
    else:
        noise_to_signal = torch.exp(-noise_schedule.marginal_lambda(ends))
        steps = evenly(noise_to_signal ** (1 / EDM_RHO), num_steps) ** EDM_RHO
        timesteps = noise_schedule.inverse_lambda(-torch.log(steps))
    timesteps[[0, -1]] = ends  # exactly, whatever the way there and back did to the last digit
    return timesteps


def uniform_timesteps(noise_schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """`make_timesteps` with the grid `uniform`."""
    return make_timesteps(noise_schedule, num_steps, "uniform")


def teacher_timesteps(noise_schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """A teacher's default grid; a network trained on fewer steps has none finer than its own."""
    return make_timesteps(noise_schedule, min(num_steps, noise_schedule.max_num_steps or num_steps))


def evenly(ends: Tensor, num_steps: int) -> Tensor:
    """`(num_steps + 1,)`, float64."""
    return torch.linspace(float(ends[0]), float(ends[1]), num_steps + 1, dtype=torch.float64)


def check_timesteps(noise_schedule: NoiseSchedule, timesteps: Tensor | list[float]) -> Tensor:
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


def check_t_ratios(noise_schedule: NoiseSchedule, timesteps: Tensor, t_ratios: Tensor | list[float] | None) -> Tensor:
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
