"""The names that requests choose from, as plain data: nothing here needs PyTorch.

A process that only checks requests or lists choices imports this module. The code behind each name is elsewhere.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

ModelType = Literal["noise", "x_start", "v", "score", "flow", "edm"]
GuidanceType = Literal["uncond", "classifier", "classifier-free"]

NamedGrid = Literal["uniform", "quadratic", "log_snr", "edm"]
GridName = Literal["default", NamedGrid]
NAMED_GRIDS: tuple[NamedGrid, ...] = get_args(NamedGrid)

BUNDLED = Path(__file__).parent / "bundled"
BUILTIN_FOLDERS = {name: BUNDLED / name for name in ("digits8", "digits32-ldm", "fashion32")}
BUILTINS = (*BUILTIN_FOLDERS, "mixture-ring", "mixture-gratings")

SAMPLER_ENTRY_POINTS = "timetuner.samplers"

# The times of a table's calls may be off by so much of the grid's first time, as those of files are rounded.
CALL_TIME_MARGIN = 1e-6


@dataclass(frozen=True)
class SamplerFacts:
    """The facts of a sampler that need no run of it; see `timetuner_core.samplers.Sampler` for the fields."""

    order: int
    calls_per_step: int = 1
    history_length: int = 0
    stochastic: bool = False
    takes_eta: bool = False
    rowwise: bool = False

    @property
    def is_table(self) -> bool:
        """Whether its steps are a table of coefficients, which can be learned: those without noise."""
        return not self.stochastic

    @property
    def is_table_of_steps(self) -> bool:
        """Whether that table has one row per step, as rivals and the tuner of pipelines need it."""
        return self.is_table and self.calls_per_step == 1

    def network_calls(self, timesteps: Sequence[float]) -> int:
        """Number of network calls over a grid of `num_steps + 1` times."""
        saved = self.calls_per_step - 1 if float(timesteps[-1]) == 0 else 0
        return self.calls_per_step * (len(timesteps) - 1) - saved

    def accepted_call_times(self, times: Sequence[float] | None, timesteps: Sequence[float]) -> str | None:
        """The times that a table's calls accept, as a text for a refusal.

        Args:
            times: None, or as many as `network_calls`.
            timesteps: the grid, `num_steps + 1` falling times.
        """
        if self.calls_per_step == 1:
            return None if times is None else "none, for a sampler that calls the network once per step"
        margin = CALL_TIME_MARGIN * timesteps[0]
        for i, (t, s) in enumerate(pairwise(timesteps)):
            of_step = (times or ())[i * self.calls_per_step : (i + 1) * self.calls_per_step]
            begins = bool(of_step) and abs(of_step[0] - t) <= margin
            if not begins or not all(s - margin <= time <= t + margin and time > 0 for time in of_step):
                return "one per network call, a step's first at its first time, the others between that and the next"
        return None


SAMPLER_FACTS = {
    "ddim": SamplerFacts(order=1, takes_eta=True, rowwise=True),
    "ddpm": SamplerFacts(order=1, stochastic=True, rowwise=True),
    "euler": SamplerFacts(order=1, rowwise=True),
    "heun": SamplerFacts(order=2, calls_per_step=2),
    "dpm_1": SamplerFacts(order=1, rowwise=True),
    "dpm_2": SamplerFacts(order=2, calls_per_step=2),
    "dpm_3": SamplerFacts(order=3, calls_per_step=3),
    "dpmpp_2s": SamplerFacts(order=2, calls_per_step=2),
    "dpmpp_2m": SamplerFacts(order=2, history_length=1),
    "dpmpp_3m": SamplerFacts(order=3, history_length=2),
    "dpmpp_2m_sde": SamplerFacts(order=1, history_length=1, stochastic=True),
    "unipc_2": SamplerFacts(order=3, history_length=2),
    "unipc_3": SamplerFacts(order=4, history_length=3),
    "ipndm": SamplerFacts(order=4, history_length=3),
    "deis": SamplerFacts(order=3, history_length=2),
}


def sampler_names() -> list[str]:
    """All sampler names: those of this package, then those of installed packages' entry points."""
    return [*SAMPLER_FACTS, *(entry.name for entry in entry_points(group=SAMPLER_ENTRY_POINTS))]


@cache
def builtin_specs() -> dict[str, dict[str, Any]]:
    """The description of each built-in model, as `timetuner_core.models.describing.describe` gives it."""
    specs: dict[str, dict[str, Any]] = json.loads((BUNDLED / "specs.json").read_text())
    return specs
