"""The dispatcher: `python -m worker.dispatcher`. Any number may run; one is enough.

It takes jobs back from workers that fell silent, and tells the broker of jobs it has not heard of: those
submitted while it was away, those it lost, those taken back. It also deletes what is not to be kept any longer.
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

    A message older than `republish_seconds` whose queue is empty was lost, or is in the hands of a worker about
    to claim it; so may be one ten times as old, whatever is in the queue. Publishing again does no harm, as a job
    can be claimed only once.
    """
    for job_class in JOB_CLASSES:
        with registry.write() as session:
            over = take_back_expired(session, job_class, max_attempts)
        bus.tell_ended(ended(job, job.state, error=job.error) for job in over if isinstance(job, SampleJob))
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
    bus.tell_ended(join_all(registry, artifacts, parents))
    if waiting:
        bus.ring()
    if model_waits:
        bus.ring_for_models()


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
        except Exception:  # database or broker away: the next round may find them back
            logger.exception("a round failed")
    if sender is not None:
        sender.stop()
    bus.close()
    registry.close()


if __name__ == "__main__":
    main()
