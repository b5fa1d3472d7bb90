"""Reading the requests of jobs, as the service stored them."""

from typing import Any

import torch
from torch import Tensor

from service.registry.tables import SampleJob, Schedule
from service.shared.arrays import decode_array
from timetuner_core.grids import check_t_ratios, check_timesteps, make_timesteps
from timetuner_core.guided_model import repeat_to_batch
from timetuner_core.models.loading import DiffusionModel
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.sampling.generate import Guidance
from timetuner_core.sampling.rolling_batch import Row


def guidance_of(request: dict[str, Any]) -> Guidance:
    interval = (request["guidance_start"], request["guidance_end"])
    always = interval == (0, 1000)
    scale, rescale = request["guidance_scale"], request["guidance_rescale"]
    return Guidance(request["guidance_type"], scale, rescale, None if always else interval)


def conditions_of(request: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The condition of each image, `(num_images, ...)`, and what stands for none, `(1, ...)`, as far as given."""
    condition = uncond_condition = None
    if request["class_labels"] is not None:
        condition = torch.tensor(request["class_labels"])
    elif request["condition"] is not None:
        condition = repeat_to_batch(torch.from_numpy(decode_array(request["condition"])), request["num_images"])
    if request["uncond_condition"] is not None:
        uncond_condition = torch.from_numpy(decode_array(request["uncond_condition"]))
    return condition, uncond_condition


def timesteps_of(request: dict[str, Any], noise_schedule: NoiseSchedule) -> Tensor:
    """The grid asked for, by name or in full: `(num_steps + 1,)`. Raises: ValueError, as `check_timesteps`."""
    timesteps = request["timesteps"]
    if isinstance(timesteps, str):
        return make_timesteps(noise_schedule, request["num_steps"], timesteps)  # type: ignore[arg-type]
    return check_timesteps(noise_schedule, timesteps)


def rows_of(job: SampleJob, model: DiffusionModel, schedule: Schedule | None) -> list[Row]:
    """The samples a job asks for.

    Raises:
        ValueError: a grid or ratios that lead out of the noise schedule's times.
    """
    request, noise_schedule = job.request, model.noise_schedule
    if schedule is None:
        timesteps, given = timesteps_of(request, noise_schedule), None
    else:
        timesteps, given = check_timesteps(noise_schedule, schedule.timesteps), schedule.t_ratios
    t_ratios = check_t_ratios(noise_schedule, timesteps, given)
    condition, uncond_condition = conditions_of(request)
    scale = request["guidance_scale"]
    return [
        Row(
            job.id,
            request["seed"] + k,
            timesteps,
            t_ratios,
            scale,
            None if condition is None else condition[k],
            None if uncond_condition is None else uncond_condition[0],
        )
        for k in range(job.num_images)
    ]
