"""A schedule in terms of noise levels, as other programs take it: sigma_t / alpha_t, or sigma_t of flow models."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from timetuner_core.clipping import Clipping, clips
from timetuner_core.exports.card import guidance_notes
from timetuner_core.exports.formats import ExportError
from timetuner_core.integrations.time_tuner_scheduler import TimeTunerScheduler
from timetuner_core.models.folder_files import ModelFormatError
from timetuner_core.models.schedulers import read_scheduler_config
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow, NoiseScheduleVP

# These take the same steps, those of Euler's method in the ODE's own variable, if no noise is added.
EULER_SAMPLERS = ("ddim", "euler", "dpm_1")

# Ratios this close to 1 are those of an untuned schedule that went through a file.
MAX_UNTUNED_RATIO = 1e-6


@dataclass(frozen=True)
class Levels:
    """A schedule and the noise schedule of its model.

    Attributes:
        config: the configuration of the scheduler that the model came with.
        schedule: as the service's API gives it.
    """

    config: Mapping[str, Any]
    schedule: Mapping[str, Any]

    @cached_property
    def scheduler(self) -> TimeTunerScheduler:
        """The scheduler that runs the schedule. Raises: ExportError."""
        names = ("timesteps", "t_ratios", "sampler", "eta", "clipping", "solver_table")
        given = {name: self.schedule[name] for name in names if name in self.schedule}
        try:
            scheduler: TimeTunerScheduler = TimeTunerScheduler(dict(self.config), **given)
        except (ValueError, ModelFormatError) as error:
            raise ExportError(f"{error}") from None
        return scheduler

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return self.scheduler.noise_schedule

    @property
    def is_flow(self) -> bool:
        return isinstance(self.noise_schedule, NoiseScheduleFlow)

    @property
    def kind(self) -> str:
        """The noise schedule's kind: `vp`, `flow` or `edm`."""
        kinds = {NoiseScheduleVP: "vp", NoiseScheduleFlow: "flow", NoiseScheduleEDM: "edm"}
        return next(kind for each, kind in kinds.items() if isinstance(self.noise_schedule, each))

    @cached_property
    def timesteps(self) -> Tensor:
        """The grid, `(num_steps + 1,)`, float64."""
        return torch.tensor(self.schedule["timesteps"], dtype=torch.float64)

    @cached_property
    def t_ratios(self) -> Tensor:
        """`(num_steps,)`, float64."""
        ratios = self.schedule.get("t_ratios") or [1.0] * (len(self.timesteps) - 1)
        return torch.tensor(ratios, dtype=torch.float64)

    @property
    def num_steps(self) -> int:
        return len(self.t_ratios)

    @cached_property
    def alphas(self) -> Tensor:
        """The numbers that divide x on the grid to give the variable of other programs, `(num_steps + 1,)`."""
        return self.alphas_at(self.timesteps)

    def alphas_at(self, t: Tensor) -> Tensor:
        """The divisors of x at times: alpha_t, or 1 for flow models."""
        return torch.ones_like(t) if self.is_flow else self.noise_schedule.marginal_alpha(t)

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise levels of the grid, `(num_steps + 1,)`, float64."""
        return self.at(self.timesteps)

    def at(self, t: Tensor) -> Tensor:
        """Noise levels at times."""
        sigma_t = self.noise_schedule.marginal_std(t)
        return sigma_t if self.is_flow else sigma_t / self.noise_schedule.marginal_alpha(t)

    @property
    def clips(self) -> bool:
        """Whether the schedule's sampler clips x0."""
        text = self.schedule.get("clipping")
        clipping = read_scheduler_config(self.config).clipping if text is None else Clipping.parse(text)
        return clips(self.schedule["sampler"], clipping)

    @property
    def notes(self) -> list[str]:
        """The sentences that hold for every export."""
        return guidance_notes(self.schedule)

    def losses(self, takes_steps_of: tuple[str, ...], name: str) -> list[str]:
        """The parts of a schedule that a program loses if it takes a grid alone.

        Args:
            takes_steps_of: the samplers whose steps it takes. name: the program's name.
        """
        found = []
        if float((self.t_ratios - 1).abs().max()) > MAX_UNTUNED_RATIO:
            found.append("t_ratios are not carried: the network is told the grid's own times")
        if self.schedule.get("solver_table") is not None:
            found.append("solver_table is not carried: the learned solver is replaced by a sampler's own steps")
        elif self.schedule["sampler"] not in takes_steps_of:
            found.append(
                f"the sampler {self.schedule['sampler']} is not carried: {name} takes {takes_steps_of[0]}'s steps"
            )
        if self.schedule.get("eta"):
            found.append(f"eta={self.schedule['eta']:g} is not carried: no noise is added")
        if self.clips:
            found.append("clipping is not carried: x0 is not clipped")
        return found


def check_losses(losses: list[str], lossy: bool) -> None:
    """Refuse to lose anything unless asked to. Raises: ExportError."""
    if losses and not lossy:
        accepted = "lossy=true, which exports the grid all the same, or the formats diffusers and comfyui-node"
        raise ExportError(f"{'; '.join(losses)}; accepted: {accepted}")
