"""Running a sampling job."""

import io

import numpy as np
import torch

from service.registry.jobs import finish
from service.registry.tables import JobState, SampleJob, Schedule
from timetuner_core.generation import generate
from worker.lease import Lease
from worker.requests import conditions_of, guidance_of, timesteps_of
from worker.runtime import Runtime


def run_sample_job(runtime: Runtime, lease: Lease) -> None:
    """Sample what the job asks for, keep it as one `.npy`, and finish the job."""
    with runtime.registry.read() as session:
        job = session.get_one(SampleJob, lease.claim.job_id)
        schedule = session.get(Schedule, job.schedule_id) if job.schedule_id else None
    request = job.request
    model = runtime.load_model(job.model_id)
    if schedule is None:
        timesteps, t_ratios = timesteps_of(request, model.noise_schedule), None
    else:
        timesteps, t_ratios = torch.tensor(schedule.timesteps, dtype=torch.float64), schedule.t_ratios
    condition, uncond_condition = conditions_of(request)
    images = generate(
        model,
        guidance_of(request),
        [request["seed"] + k for k in range(request["num_images"])],
        condition,
        timesteps,
        t_ratios,
        request["eta"],
        uncond_condition=uncond_condition,
        sampler=request["sampler"],
        device=runtime.device,
        after_step=lease.check,
    )
    buffer = io.BytesIO()
    np.save(buffer, images.float().cpu().numpy(), allow_pickle=False)
    # The token is in the name: a worker that lost its lease cannot overwrite its successor's result.
    artifact = f"samples/{job.id}-{lease.claim.fencing_token}.npy"
    runtime.artifacts.put(artifact, buffer.getvalue())
    with lease.write() as (session, current):
        assert isinstance(current, SampleJob)
        current.artifact = artifact
        finish(session, current, JobState.SUCCEEDED)
