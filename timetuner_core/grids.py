"""Time grids: `timesteps` of shape `(num_steps + 1,)`, float64, falling from where sampling starts."""

from typing import TypeAlias, get_args

import torch
from torch import Tensor

from timetuner_core.catalog import GridName, NamedGrid
from timetuner_core.noise_schedule import NoiseSchedule

Timesteps: TypeAlias = Tensor | list[float]

EDM_RHO = 7.0
LOWEST_LAMBDA = -5.1  # diffusers recommends it as `lambda_min_clipped`; below, x_t tells nothing of x0


def make_timesteps(noise_schedule: NoiseSchedule, num_steps: int, grid: GridName = "default") -> Tensor:
    """Exactly `num_steps` steps from the schedule's `t_start` to its `t_min`, or to 0 by a last step from there.

    The last step is added where `t_min` leaves noise that one can see (see `NoiseSchedule.t_end`): flow matching
    trained on few steps, or EDM with a large `sigma_min`. diffusers ends all grids of these two at 0.

    - `default`: the schedule's own, `edm` for EDM, whose t is sigma, else `uniform`.
    - `uniform`: in t.
    - `quadratic`: in the square root of t (DDIM, Song et al. 2021, appendix D.2).
    - `log_snr`: in lambda_t (DPM-Solver, Lu et al. 2022).
    - `edm`: in `(sigma_t / alpha_t)**(1 / 7)` (EDM, Karras et al. 2022, eq. 5).

    Where lambda is below `LOWEST_LAMBDA` (it is -13.8 where alpha at `T` is taken as 1e-6), `log_snr` and `edm`
    take no more than their first step.

    Raises:
        ValueError: an unknown `grid`; `num_steps` below 1, or above `N` for a discrete schedule.
    """
    if grid not in get_args(GridName):
        raise ValueError(f"grid is {grid!r}; accepted: {', '.join(get_args(GridName))}")
    limit = noise_schedule.max_num_steps
    if num_steps < 1 or (limit is not None and num_steps > limit):
        accepted = f"1 to {limit}" if limit is not None else "1 or more"
        raise ValueError(f"num_steps is {num_steps}; accepted: {accepted}")
    clean = torch.zeros(1, dtype=torch.float64)
    ends = torch.tensor([noise_schedule.t_start, noise_schedule.t_min], dtype=torch.float64)
    if grid == "default":
        grid = noise_schedule.default_grid
    if limit == 1 or (noise_schedule.t_end == 0 and num_steps == 1):  # T and t_min coincide for N = 1.
        return torch.cat([ends[:1], clean])
    if noise_schedule.t_end == 0:
        return torch.cat([_named_grid(noise_schedule, ends, num_steps - 1, grid), clean])
    return _named_grid(noise_schedule, ends, num_steps, grid)


def _named_grid(noise_schedule: NoiseSchedule, ends: Tensor, num_steps: int, grid: NamedGrid) -> Tensor:
    """`grid_between` both ends; no more than the first step is over what tells nothing of x0."""
    timesteps = grid_between(noise_schedule, ends, num_steps, grid)
    if grid not in ("log_snr", "edm") or bool(noise_schedule.marginal_lambda(timesteps[1]) >= LOWEST_LAMBDA):
        return timesteps
    informed = noise_schedule.inverse_lambda(ends.new_tensor([LOWEST_LAMBDA]))
    rest = grid_between(noise_schedule, torch.cat([informed, ends[1:]]), num_steps - 1, grid)
    return torch.cat([ends[:1], rest])


def named_grids(noise_schedule: NoiseSchedule, num_steps: int) -> dict[NamedGrid, Tensor]:
    """The grids by their names, each once: `default` has another name, too, and one step leaves no choice."""
    grids: dict[NamedGrid, Tensor] = {}
    for name in get_args(NamedGrid):
        grid = make_timesteps(noise_schedule, num_steps, name)
        if not any(torch.equal(grid, before) for before in grids.values()):
            grids[name] = grid
    return grids


def start_grids(noise_schedule: NoiseSchedule, num_steps: int) -> list[Tensor]:
    """The grids of all names, each once."""
    return list(named_grids(noise_schedule, num_steps).values())


def start_grids_with_free_step(noise_schedule: NoiseSchedule, num_steps: int) -> list[Tensor]:
    """The grids of all names with a step more, which is free, so that they begin where it ends.

    It takes no call of the network: x0 is taken to be 0, so that sampling starts from less noise. There are none where
    sampling cannot start later (see `NoiseSchedule.can_start_later`), nor where the schedule has no step more.
    """
    limit = noise_schedule.max_num_steps
    if not noise_schedule.can_start_later or (limit is not None and num_steps >= limit):
        return []
    return [grid[1:] for grid in start_grids(noise_schedule, num_steps + 1)]


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
    timesteps[[0, -1]] = ends  # The way to lambda and back may have changed their last digits.
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

    A ratio that leaves the bounds by its dtype's rounding only is moved onto them.

    Raises:
        ValueError: another number of ratios than steps, or conditioning `t * t_ratio` outside `(0, T]`, or below
            both t and `t_min`: a discrete network would be told a time before its first.
    """
    num_steps = len(timesteps) - 1
    if t_ratios is None:
        return timesteps.new_ones(num_steps)
    given = torch.as_tensor(t_ratios)
    ratios = given.to(timesteps)
    if ratios.shape != (num_steps,):
        raise ValueError(f"t_ratios has shape {tuple(ratios.shape)}; accepted: ({num_steps},), one per step")
    t = timesteps[:-1]
    conditioning = t * ratios
    rounding = max(1e-6, torch.finfo(given.dtype).eps) if given.is_floating_point() else 1e-6
    if not bool(((conditioning > 0) & (conditioning <= noise_schedule.T * (1 + rounding))).all()):
        raise ValueError(f"t * t_ratio must stay within (0, {noise_schedule.T}]; got {conditioning.tolist()}")
    lowest = t.clamp(max=noise_schedule.t_min)
    if not bool((conditioning >= lowest * (1 - rounding)).all()):
        message = f"t * t_ratio must not fall below t_min, {noise_schedule.t_min}"
        raise ValueError(f"{message}, unless t itself does; got {conditioning.tolist()}")
    ratios = torch.where(conditioning < lowest, lowest / t, ratios)
    return torch.where(conditioning > noise_schedule.T, noise_schedule.T / t, ratios)
