"""The dispatcher: `timetuner dispatcher`. Any number may run; one is enough.

It takes jobs back whose leases expired. It publishes jobs that the broker has no message of: those submitted while the
broker was away, those it lost, those taken back. It deletes old samples, and sends webhooks.
"""

import logging
import signal
import threading
from datetime import timedelta

from celery import Celery
from prometheus_client import Gauge, start_http_server

from service.registry.database import Registry
from service.registry.jobs import JOB_CLASSES, PUBLISHED_CLASSES, take_back_expired, unpublished
from service.registry.models import next_registration
from service.registry.samples import ended, forgotten_parents, samples_wait
from service.registry.tables import SampleJob
from service.shared.artifacts import ArtifactStore
from service.shared.logs import start_logging
from service.shared.queue import TASKS, celery_app, publish
from service.shared.settings import Settings
from service.shared.signals import Bus
from worker.joining import join_all
from worker.retention import Sweeper

logger = logging.getLogger(__name__)

LAST_ROUND = Gauge("timetuner_dispatch_time_seconds", "Unix time at which the dispatcher last ended a whole round.")


def dispatch_once(
    registry: Registry,
    artifacts: ArtifactStore,
    app: Celery,
    bus: Bus,
    max_attempts: int,
    republish_seconds: float,
) -> None:
    """One round over all kinds of jobs.

    A message older than `republish_seconds` whose queue is empty was lost, or a worker is about to claim its job. A
    message ten times as old is taken for lost even if the queue is not empty. Publishing again does no harm, because a
    job can be claimed only once.
    """
    for job_class in JOB_CLASSES:
        with registry.write() as session:
            over = take_back_expired(session, job_class, max_attempts)
        bus.publish_ends(ended(job, job.state, error=job.error) for job in over if isinstance(job, SampleJob))
    for job_class in PUBLISHED_CLASSES:
        with registry.read() as session:
            surely = unpublished(session, job_class, published_before=timedelta(seconds=10 * republish_seconds))
            due = unpublished(session, job_class, published_before=timedelta(seconds=republish_seconds))
        if set(due) != set(surely) and queue_length(app, TASKS[job_class][1]) > 0:
            due = surely
        if due:
            publish(app, registry, job_class, due)
    with registry.read() as session:
        parents, waiting = forgotten_parents(session), samples_wait(session)
        model_waits = next_registration(session) is not None
    bus.publish_ends(join_all(registry, artifacts, parents))
    if waiting:
        bus.announce_samples()
    if model_waits:
        bus.announce_models()


def queue_length(app: Celery, queue: str) -> int:
    """How many messages wait in a queue of the broker."""
    with app.connection_for_read() as connection:
        length: int = connection.default_channel.client.llen(queue)
        return length


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = Settings()
    start_logging(settings.log_level)
    if settings.dispatcher_metrics_port:
        start_http_server(settings.dispatcher_metrics_port, settings.metrics_host)
    registry, app = Registry(settings.database_url), celery_app(settings.broker_url)
    artifacts, bus = ArtifactStore(settings.artifacts_url), Bus(app, settings.broker_url)
    sweeper = Sweeper(registry, artifacts, settings.keep_samples_days)
    sender = None
    if settings.webhook_secret:
        from worker.webhooks import WebhookSender

        sender = WebhookSender(registry, settings)
        sender.start()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(settings.dispatch_interval_seconds):
        try:
            dispatch_once(registry, artifacts, app, bus, settings.max_attempts, settings.republish_seconds)
            sweeper.sweep_if_due()
            LAST_ROUND.set_to_current_time()
        except Exception:  # The database or the broker is away. The next round tries again.
            logger.exception("a round failed")
    if sender is not None:
        sender.stop()
    bus.close()
    registry.close()


if __name__ == "__main__":
    main()
