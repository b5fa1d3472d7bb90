"""The dispatcher: `timetuner dispatcher`. Any number may run; one is enough.

It takes jobs back whose leases expired. It publishes jobs that the broker has no message of: those submitted while the
broker was away, those it lost, those taken back. It deletes old samples, and sends webhooks.
"""

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from celery import Celery
from prometheus_client import Counter, Gauge, start_http_server

from service.registry.database import Registry
from service.registry.jobs import (
    JOB_CLASSES,
    PUBLISHED_CLASSES,
    expired_jobs,
    request_cancel,
    take_back_expired,
    unpublished,
)
from service.registry.keys import jobs_of_revoked_keys
from service.registry.models import next_registration
from service.registry.samples import ended, forgotten_parents, samples_wait
from service.registry.tables import Job, SampleJob, TuningJob
from service.shared.artifacts import ArtifactStore
from service.shared.logs import start_logging
from service.shared.queue import TASKS, celery_app, publish
from service.shared.settings import Settings
from service.shared.signals import Bus
from worker.joining import join_one
from worker.retention import Sweeper

logger = logging.getLogger(__name__)

LAST_ROUND = Gauge("timetuner_dispatch_time_seconds", "Unix time at which the dispatcher last ended a whole round.")
FAILURES = Counter("timetuner_dispatch_failures", "Parts of rounds that failed.", ("part",))


def dispatch_once(
    registry: Registry,
    artifacts: ArtifactStore,
    app: Celery,
    bus: Bus,
    max_attempts: int,
    republish_seconds: float,
    max_stored_bytes: int = 0,
) -> bool:
    """One round over all kinds of jobs. What fails for one of them stops nothing else.

    A message older than `republish_seconds` whose queue is empty was lost, or a worker is about to claim its job. A
    message ten times as old is taken for lost even if the queue is not empty. Publishing again does no harm, because a
    job can be claimed only once.

    Returns:
        Whether all went well.
    """
    one = Round()
    for job_class in JOB_CLASSES:
        expired: Sequence[str] = ()
        with one.part("take_back"), registry.read() as session:
            expired = expired_jobs(session, job_class)
        for job_id in expired:
            with one.part("take_back"):
                with registry.write() as session:
                    over = take_back_expired(session, job_class, max_attempts, job_id)
                bus.publish_ends(ended(job, job.state, error=job.error) for job in over if isinstance(job, SampleJob))
    for owned_class in (TuningJob, SampleJob):
        unwanted: Sequence[str] = ()
        with one.part("revoked"), registry.read() as session:
            unwanted = jobs_of_revoked_keys(session, owned_class)
        for job_id in unwanted:
            with one.part("revoked"), registry.write() as session:
                request_cancel(session, session.get_one(owned_class, job_id, with_for_update=True))
                logger.info("cancelled, as its key was revoked", extra={"job_id": job_id})
    for job_class in PUBLISHED_CLASSES:
        with one.part("publish"):
            _publish(registry, app, job_class, republish_seconds)
    parents: Sequence[str] = ()
    with one.part("join"), registry.read() as session:
        parents = forgotten_parents(session)
    for parent_id in parents:
        with one.part("join"):
            end = join_one(registry, artifacts, parent_id, max_stored_bytes)
            bus.publish_ends([end] if end else [])
    with one.part("announce"):
        with registry.read() as session:
            waiting, model_waits = samples_wait(session), next_registration(session) is not None
        if waiting:
            bus.announce_samples()
        if model_waits:
            bus.announce_models()
    return one.went_well


class Round:
    """A round of the dispatcher, and whether it went well so far."""

    def __init__(self) -> None:
        self.went_well = True

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the round. Errors are logged and counted, and end only this part."""
        try:
            yield
        except Exception:  # The database, the broker or the artifacts are away, or something there is broken.
            logger.exception("a part of a round failed: %s", name)
            FAILURES.labels(name).inc()
            self.went_well = False


def _publish(registry: Registry, app: Celery, job_class: type[Job], republish_seconds: float) -> None:
    """Publish the jobs of a kind whose messages were lost."""
    with registry.read() as session:
        surely = unpublished(session, job_class, published_before=timedelta(seconds=10 * republish_seconds))
        due = unpublished(session, job_class, published_before=timedelta(seconds=republish_seconds))
    if set(due) != set(surely) and queue_length(app, TASKS[job_class][1]) > 0:
        due = surely
    if due:
        publish(app, registry, job_class, due)


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
    sweeper = Sweeper(
        registry,
        artifacts,
        settings.keep_samples_days,
        keep_events_days=settings.keep_events_days,
        keep_rejected_days=settings.keep_rejected_days,
        keep_audit_days=settings.keep_audit_days,
        max_stored_bytes=settings.max_stored_bytes,
    )
    sender = None
    if settings.webhook_secret:
        from worker.webhooks import WebhookSender

        sender = WebhookSender(registry, settings)
        sender.start()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(settings.dispatch_interval_seconds):
        went_well = dispatch_once(
            registry,
            artifacts,
            app,
            bus,
            settings.max_attempts,
            settings.republish_seconds,
            settings.max_stored_bytes,
        )
        sweep = Round()
        with sweep.part("sweep"):
            sweeper.sweep_if_due()
        with sweep.part("make_room"):
            sweeper.make_room()
        if went_well and sweep.went_well:
            LAST_ROUND.set_to_current_time()
    if sender is not None:
        sender.stop()
    bus.close()
    registry.close()


if __name__ == "__main__":
    main()
