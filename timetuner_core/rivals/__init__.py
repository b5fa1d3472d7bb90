"""Published rivals of `t_ratios`: they choose a time grid, a solver (DC-Solver) or a correction (PAS).

The grids are those of AYS and its published lists, of GITS, OSS and DMN. Each search takes a `TuningProblem` and gives
`timesteps` `(num_steps + 1,)`, float64, falling, with the problem's own ends and number of steps; the times between are
all that changes. A grid that ends at 0, where lambda is infinite, keeps its last positive time too. docs/rivals.md says
how each differs from its paper.
"""

from timetuner_core.rivals.ays import ays_timesteps
from timetuner_core.rivals.ays_list import ays_list_timesteps
from timetuner_core.rivals.dc_solver import dc_solver_table
from timetuner_core.rivals.dmn import dmn_timesteps
from timetuner_core.rivals.gits import gits_timesteps
from timetuner_core.rivals.oss import oss_timesteps
from timetuner_core.rivals.pas import PasCorrection, pas_correction

__all__ = [
    "PasCorrection",
    "ays_list_timesteps",
    "ays_timesteps",
    "dc_solver_table",
    "dmn_timesteps",
    "gits_timesteps",
    "oss_timesteps",
    "pas_correction",
]
