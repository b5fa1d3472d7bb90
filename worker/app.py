"""The Celery application, run by `timetuner worker`.

Pool `threads` with one thread: a forked child (Celery's default pool) cannot use a CUDA context its parent
made, and `solo` answers no ping while it works. One process serves one device; more devices, more
processes.

PyTorch is imported by the first job, not when a worker starts: an idle worker needs none of it. A worker that samples
imports it before its first job comes.
"""

import threading
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from celery.platforms import SecurityWarning
from celery.signals import setup_logging, worker_ready, worker_shutting_down

from service.registry.tables import Job, TuningJob, TuningTask
from service.shared.garbage import no_collections
from service.shared.queue import TASKS, celery_app
from service.shared.settings import Settings
from service.shared.signals import SAMPLE_QUEUE, SAMPLE_TASK
from worker.describing import Describer

if TYPE_CHECKING:
    from worker.runtime import Runtime
    from worker.sampling import SampleServer

# Celery warns root users of unpickling messages. These messages are JSON and hold only a job's id.
warnings.simplefilter("ignore", SecurityWarning)

settings = Settings()
app = celery_app(settings.broker_url)
stopping = threading.Event()

_making_runtime = threading.Lock()


@lru_cache(maxsize=1)
def _make_runtime() -> "Runtime":
    with no_collections():
        from worker.runtime import Runtime

    return Runtime(settings, app, stopping)


def _runtime() -> "Runtime":
    """The process's runtime. The first caller waits for PyTorch; one of two threads makes it."""
    with _making_runtime:
        return _make_runtime()


def _name(job_class: type[Job]) -> str:
    return TASKS[job_class][0]


@app.task(name=_name(TuningJob))  # type: ignore[untyped-decorator]
def tune(job_id: str) -> None:
    """Run a tuning job."""
    from worker.tuning import run_tuning_job

    _runtime().run(TuningJob, job_id, run_tuning_job)


@app.task(name=_name(TuningTask))  # type: ignore[untyped-decorator]
def tune_step(task_id: str) -> None:
    """Run a task of a tuning job."""
    from worker.tuning_tasks import run_tuning_task

    _runtime().run(TuningTask, task_id, run_tuning_task)


@lru_cache(maxsize=1)
def _sample_server() -> "SampleServer":
    with no_collections():
        from worker.sampling import SampleServer

    return SampleServer(_runtime())


@app.task(name=SAMPLE_TASK)  # type: ignore[untyped-decorator]
def serve_samples() -> None:
    """Run sampling jobs until none is left."""
    _sample_server().serve()


@lru_cache(maxsize=1)
def _describer() -> Describer:
    return Describer(settings, app, stopping, _runtime)


def wait_for_describer() -> None:
    """Let the model at hand be described before the process ends, if there is time."""
    stopping.set()
    if _describer.cache_info().currsize:
        _describer().join(settings.drain_seconds)


@setup_logging.connect  # type: ignore[untyped-decorator]
def _leave_logging(**_: Any) -> None:
    """Do nothing: a receiver of this signal keeps Celery from setting up logging."""


@worker_ready.connect  # type: ignore[untyped-decorator]
def _warm_up(**_: Any) -> None:
    """Prepare for sampling before the first task."""
    _describer()
    if SAMPLE_QUEUE in app.amqp.queues.consume_from:
        _runtime().give_way = _sample_server().serve_if_called
        _runtime().warm_up()


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _stop_taking(**_: Any) -> None:
    """Stop: running samples are finished if there is time. Tuning jobs and jobs that have not begun are handed back."""
    stopping.set()
    if _sample_server.cache_info().currsize:
        _sample_server().stop()
