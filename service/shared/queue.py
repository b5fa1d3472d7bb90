"""The queue of tuning: one Celery message per job, which holds only the job's id."""

from celery import Celery
from kombu.exceptions import OperationalError

from service.registry.database import Registry
from service.registry.jobs import mark_published
from service.registry.tables import Job, TuningJob, TuningTask
from service.shared.signals import SAMPLE_QUEUE

TASKS: dict[type[Job], tuple[str, str]] = {
    TuningJob: ("worker.tune", "tuning"),
    TuningTask: ("worker.tune_step", "tuning"),
}
QUEUES = (SAMPLE_QUEUE, "tuning")


def celery_app(broker_url: str) -> Celery:
    """A Celery application that keeps no results: the registry has them."""
    app = Celery("timetuner", broker=broker_url)
    app.conf.update(
        task_ignore_result=True,
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # A busy worker must not reserve jobs that an idle one could run.
        broker_connection_retry_on_startup=True,
        # Sending must fail soon while the broker is away. The dispatcher sends the message later.
        broker_transport_options={"socket_connect_timeout": 2, "socket_timeout": 5, "max_retries": 1}
        | {"queue_order_strategy": "sorted"},  # Queues are served by name: sampling before tuning.
        task_publish_retry=False,
        worker_hijack_root_logger=False,
        enable_utc=True,
    )
    return app


def publish(app: Celery, registry: Registry, job_class: type[Job], job_ids: list[str]) -> bool:
    """Send one message per job and note that in the registry; False if the broker cannot be reached."""
    task, queue = TASKS[job_class]
    try:
        for job_id in job_ids:
            app.send_task(task, args=(job_id,), queue=queue)
    except (OperationalError, OSError):
        return False
    with registry.write() as session:
        mark_published(session, job_class, job_ids)
    return True
