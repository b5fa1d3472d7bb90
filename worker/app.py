"""The Celery application, run by `python -m worker`.

Pool `threads` with one thread: a forked child (Celery's default pool) cannot use a CUDA context its parent
made, and `solo` answers no ping while it works. One process serves one device; more devices, more
processes.
"""

import warnings
from functools import lru_cache
from typing import Any

from celery.platforms import SecurityWarning
from celery.signals import setup_logging, worker_ready, worker_shutting_down

from service.registry.tables import Job, TuningJob, TuningTask
from service.shared.queue import TASKS, celery_app
from service.shared.settings import Settings
from service.shared.signals import SAMPLE_QUEUE, SAMPLE_TASK
from worker.runtime import Runtime
from worker.sampling import SampleServer
from worker.tuning import run_tuning_job
from worker.tuning_tasks import run_tuning_task

# Celery warns root users of unpickling messages. These messages are JSON and hold only a job's id.
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


@lru_cache(maxsize=1)
def _sample_server() -> SampleServer:
    return SampleServer(_runtime())


@app.task(name=SAMPLE_TASK)  # type: ignore[untyped-decorator]
def serve_samples() -> None:
    """Run sampling jobs until none is left."""
    _sample_server().serve()


@setup_logging.connect  # type: ignore[untyped-decorator]
def _leave_logging(**_: Any) -> None:
    """Do nothing: a receiver of this signal keeps Celery from setting up logging."""


@worker_ready.connect  # type: ignore[untyped-decorator]
def _warm_up(**_: Any) -> None:
    """Prepare for sampling before the first task."""
    if SAMPLE_QUEUE in app.amqp.queues.consume_from:
        _runtime().give_way = _sample_server().serve_if_called
        _runtime().warm_up()


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _stop_taking(**_: Any) -> None:
    """Stop: running samples are finished if there is time. Tuning jobs and jobs that have not begun are handed back."""
    _runtime().stopping.set()
    _sample_server().stop()
