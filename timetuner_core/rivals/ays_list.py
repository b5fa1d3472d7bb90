"""The noise levels that the authors of Align Your Steps published for three models, as diffusers ships them."""

from typing import Literal

import torch
from torch import Tensor

from timetuner_core.rivals.candidates import fixed_steps, grid_ends, with_end
from timetuner_core.tuning.problem import TuningProblem

AysListName = Literal["sd15", "sdxl", "svd"]

# `sigma_t / alpha_t` at the start of each of ten steps; a last one goes on to the clean image.
PUBLISHED_LEVELS: dict[AysListName, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}


def ays_list_timesteps(problem: TuningProblem, levels_of: AysListName = "sd15") -> Tensor:
    """The published noise levels, for any number of steps by log-linear interpolation, as their authors advise.

    The network is not asked. The grid keeps the problem's own ends.

    Args:
        levels_of: the model that the levels were found for: Stable Diffusion 1.5, its XL, or Stable Video Diffusion.

    Returns:
        `(num_steps + 1,)`, float64.

    Raises:
        ValueError: levels that do not fall within the problem's own.
    """
    ends, num_hops = grid_ends(problem), problem.num_steps - fixed_steps(problem)
    last = -problem.noise_schedule.marginal_lambda(ends[1:])
    log_levels = torch.cat([torch.tensor(PUBLISHED_LEVELS[levels_of], dtype=torch.float64).log(), last])
    where = torch.linspace(0, len(log_levels) - 1, num_hops + 1, dtype=torch.float64)[1:-1]
    before = where.floor().long()
    share = where - before
    inner = (1 - share) * log_levels[before] + share * log_levels[before + 1]
    timesteps = torch.cat([ends[:1], problem.noise_schedule.inverse_lambda(-inner), ends[1:]])
    return with_end(problem, timesteps if num_hops else ends[:1])
