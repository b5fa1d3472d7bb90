"""The Celery application, run by `python -m worker`.

Pool `threads` with one thread: a forked child (Celery's default pool) cannot use a CUDA context its parent
made, and `solo` answers no ping while it works. One process serves one device; more devices, more
processes.
"""

import warnings
from functools import lru_cache

from celery.platforms import SecurityWarning

from service.queue import TASKS, celery_app
from service.registry.tables import Job, SampleJob, TuningJob, TuningTask
from service.settings import Settings
from worker.runtime import Runtime
from worker.sampling import run_sample_job
from worker.tuning import run_tuning_job
from worker.tuning_tasks import run_tuning_task

# Celery warns root of unpickling messages; ours are JSON and hold nothing but a job's id.
warnings.simplefilter("ignore", SecurityWarning)

settings = Settings()
app = celery_app(settings.broker_url)


@lru_cache(maxsize=1)
def _runtime() -> Runtime:
    return Runtime(settings, app)


def _name(job_class: type[Job]) -> str:
    return TASKS[job_class][0]


@app.task(name=_name(TuningJob))  # type: ignore[untyped-decorator]
def tune(job_id: str) -> None:
    """Run a tuning job."""
    _runtime().run(TuningJob, job_id, run_tuning_job)


@app.task(name=_name(TuningTask))  # type: ignore[untyped-decorator]
def tune_step(task_id: str) -> None:
    """Run a task of a tuning job."""
    _runtime().run(TuningTask, task_id, run_tuning_task)


@app.task(name=_name(SampleJob))  # type: ignore[untyped-decorator]
def sample(job_id: str) -> None:
    """Run a sampling job."""
    _runtime().run(SampleJob, job_id, run_sample_job)
