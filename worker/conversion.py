"""Requests as the core's objects: guidance, time grids, conditions and the rows of a sampling batch."""

import torch
from torch import Tensor

from service.registry.tables import SampleJob, Schedule
from service.shared.arrays import decode_array
from service.shared.job_requests import SampleRequest, SamplingSetting, TuningJobRequest
from timetuner_core.grids import check_t_ratios, check_timesteps, make_timesteps
from timetuner_core.guided_model import repeat_to_batch
from timetuner_core.models.loading import DiffusionModel
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers.solver_table import SolverTable, check_solver
from timetuner_core.sampling.generate import Guidance
from timetuner_core.sampling.rolling_batch import Row


def guidance_of(request: SamplingSetting) -> Guidance:
    """The guidance of every step. An interval that holds all times is none, so that such requests share batches."""
    interval = (float(request.guidance_start), float(request.guidance_end))
    scale, rescale = float(request.guidance_scale), float(request.guidance_rescale)
    return Guidance(request.guidance_type, scale, rescale, None if interval == (0, 1000) else interval)


def guidance_scales_of(request: TuningJobRequest) -> tuple[float, float] | None:
    """The interval of guidance scales that a schedule is tuned for; None of one scale."""
    if request.guidance_scales is None:
        return None
    low, high = map(float, request.guidance_scales)
    return low, high


def conditions_of(request: SampleRequest) -> tuple[Tensor | None, Tensor | None]:
    """The condition of each image, `(num_images, ...)`, and the condition that stands for none, `(1, ...)`.

    Each is None where the request does not give it.
    """
    condition = uncond_condition = None
    if request.class_labels is not None:
        condition = torch.tensor(request.class_labels)
    elif request.condition is not None:
        condition = repeat_to_batch(torch.from_numpy(decode_array(request.condition)), request.num_images)
    if request.uncond_condition is not None:
        uncond_condition = torch.from_numpy(decode_array(request.uncond_condition))
    return condition, uncond_condition


def timesteps_of(request: SampleRequest | TuningJobRequest, noise_schedule: NoiseSchedule) -> Tensor:
    """The grid that a request names or gives in full, `(num_steps + 1,)`. Raises: ValueError, as `check_timesteps`."""
    if isinstance(request.timesteps, str):
        return make_timesteps(noise_schedule, request.num_steps, request.timesteps)
    return check_timesteps(noise_schedule, request.timesteps)


def rows_of(job: SampleJob, request: SampleRequest, model: DiffusionModel, schedule: Schedule | None) -> list[Row]:
    """The samples that a job asks for, one row each.

    Raises:
        ValueError: the grid or the ratios lead out of the noise schedule's times, or a learned solver is none of this
            sampler, or its calls are not those of the grid.
    """
    noise_schedule = model.noise_schedule
    if schedule is None:
        timesteps, given = timesteps_of(request, noise_schedule), None
    else:
        timesteps, given = check_timesteps(noise_schedule, schedule.timesteps), schedule.t_ratios
    t_ratios = check_t_ratios(noise_schedule, timesteps, given)
    table = None
    if schedule is not None and schedule.solver_table is not None:
        table = SolverTable.from_dict(schedule.solver_table)
        check_solver(request.sampler, table, timesteps)
    condition, uncond_condition = conditions_of(request)
    scale = float(request.guidance_scale)
    return [
        Row(
            job.id,
            request.seed + k,
            timesteps,
            t_ratios,
            scale,
            None if condition is None else condition[k],
            None if uncond_condition is None else uncond_condition[0],
            table,
        )
        for k in range(job.num_images)
    ]
