"""Tuners whose steps are independent have one task per step, which any tuning worker may take.

The job's own worker takes tasks, too, one after another, so that a job ends even without other workers.
"""

import time
from functools import partial

from sqlalchemy import select

from service.registry.jobs import add_tasks, finish, is_free
from service.registry.tables import FINAL_STATES, JobState, TuningJob, TuningTask
from service.shared.queue import publish
from timetuner_core.tuning.problem import TuningState
from worker.lease import JobCancelledError, Lease
from worker.runtime import Runtime
from worker.tuned_sampler import TunedSampler
from worker.tuning_state import load_state, read_job, step_rows, tune

POLL_SECONDS = 0.1


class TaskFailedError(Exception):
    """A step could not be tuned."""


def tune_by_tasks(runtime: Runtime, lease: Lease, sampler: TunedSampler) -> TuningState:
    """Tune every step, here or on other workers. Returns the merged state.

    Raises:
        TaskFailedError: one of the tasks failed.
    """
    job_id = lease.claim.job_id
    _make_tasks(lease, sampler)
    publish(runtime.celery, runtime.registry, TuningTask, [task.id for task in _open_tasks(runtime, job_id)])
    with lease.meter.paused():  # Each task has a meter of its own.
        while _open_tasks(runtime, job_id):
            lease.check()
            task_id = _next_free(runtime, job_id)
            with lease.watch.paused():  # A task is watched by itself.
                has_run = task_id is not None and runtime.run(TuningTask, task_id, run_tuning_task)
            if not has_run:
                time.sleep(POLL_SECONDS)
    with runtime.registry.read() as session:
        return load_state(read_job(session, job_id), sampler.timesteps)


def run_tuning_task(runtime: Runtime, lease: Lease) -> None:
    """Tune one step from its saved state, and finish the task."""
    with runtime.registry.read() as session:
        task = session.get_one(TuningTask, lease.claim.job_id)
        job = read_job(session, task.job_id)
    sampler = TunedSampler(runtime, job, lease)
    state = load_state(job, sampler.timesteps)
    write, seconds = partial(lease.write_to, job.id), runtime.settings.save_seconds
    tune(sampler, state, lease, write, seconds, [task.step_index])
    lease.persist(lambda: _finish(lease))


def _finish(lease: Lease) -> None:
    with lease.write() as (session, task):
        finish(session, task, JobState.SUCCEEDED)


def _make_tasks(lease: Lease, sampler: TunedSampler) -> None:
    """Store a task for each step to be tuned, and the initial state of all steps. Earlier attempts' tasks are kept."""
    with lease.write() as (session, job):
        assert isinstance(job, TuningJob)
        state = load_state(job, sampler.timesteps)
        all_steps = range(len(state.t_ratios))
        state.done[[i for i in all_steps if i not in sampler.tuned_steps]] = True
        for row in step_rows(job.id, state, all_steps):
            session.merge(row)
        job.timesteps = state.timesteps.tolist()
        add_tasks(session, job, sampler.tuned_steps)


def _open_tasks(runtime: Runtime, job_id: str) -> list[TuningTask]:
    """The job's tasks that are not over, by step. Raises: TaskFailedError, JobCancelledError."""
    with runtime.registry.read() as session:
        query = select(TuningTask).where(TuningTask.job_id == job_id).order_by(TuningTask.step_index)
        tasks = list(session.scalars(query))
    for task in tasks:
        if task.state == JobState.FAILED:
            raise TaskFailedError(f"step {task.step_index}: {task.error}")
        if task.state == JobState.CANCELLED:
            raise JobCancelledError(job_id)  # Tasks are cancelled only with their job.
    return [task for task in tasks if task.state not in FINAL_STATES]


def _next_free(runtime: Runtime, job_id: str) -> str | None:
    free = select(TuningTask.id).where(TuningTask.job_id == job_id, is_free(TuningTask))
    with runtime.registry.read() as session:
        return session.scalar(free.order_by(TuningTask.step_index).limit(1))
