"""The API's Prometheus metrics. docs/observability.md explains each."""

import logging
import time
from collections.abc import Collection, Iterator

from prometheus_client import CollectorRegistry, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.registry.database import Registry
from service.registry.stored_bytes import stored_bytes
from service.registry.tables import Job, JobState, SampleJob
from service.registry.types import utc_now
from service.samples.admission import Admission
from service.shared.telemetry import KINDS

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
OTHER = "other"  # The label of unknown methods and paths. Clients invent them, and labels must stay few.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

logger = logging.getLogger(__name__)


class Metrics:
    """One application's metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "timetuner_http_request_seconds",
            "Time to the end of the answer, a wait for samples included.",
            ("method", "route", "status"),
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)


class QueueCollector(Collector):
    """The queues as the registry has them at the moment, and how fast samples are served."""

    def __init__(self, registry: Registry, admission: Admission, max_stored_bytes: int = 0) -> None:
        self._registry = registry
        self._admission = admission
        self._max_stored_bytes = max_stored_bytes

    def collect(self) -> Iterator[Metric]:
        """Collect the metrics. While the database is away, those of the queues are left out."""
        if self._admission.rate is not None:
            name, text = "timetuner_sampling_images_per_second", "As measured while some were waiting."
            yield GaugeMetricFamily(name, text, self._admission.rate)
        jobs = GaugeMetricFamily("timetuner_queue_jobs", "Jobs that wait for a worker.", labels=("kind",))
        age = GaugeMetricFamily("timetuner_queue_age_seconds", "How long the oldest has waited.", labels=("kind",))
        try:
            for job_class, kind in KINDS.items():
                count, seconds = self._waiting(job_class)
                jobs.add_metric((kind,), count)
                age.add_metric((kind,), seconds)
            with self._registry.read() as session:
                stored = stored_bytes(session) if self._max_stored_bytes else 0
        except SQLAlchemyError:
            logger.warning("the queues cannot be read")
            return
        yield jobs
        yield age
        if self._max_stored_bytes:
            yield GaugeMetricFamily("timetuner_stored_bytes", "Models and samples that are stored.", stored)
            yield GaugeMetricFamily("timetuner_max_stored_bytes", "MAX_STORED_BYTES.", self._max_stored_bytes)

    def _waiting(self, job_class: type[Job]) -> tuple[int, float]:
        """How many jobs are queued, and for how many seconds the oldest has been."""
        query = select(func.count(), func.min(job_class.created_at)).where(job_class.state == JobState.QUEUED)
        if job_class is SampleJob:
            query = query.where(SampleJob.num_parts == 0)  # Workers take only the parts of a job that was split.
        with self._registry.read() as session:
            count, oldest = session.execute(query).one()
        return count, max(0.0, (utc_now() - oldest).total_seconds()) if oldest else 0.0


class MetricsMiddleware:
    """Measures every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        """`paths` are the known ones. A request refused before routing is labelled by its path if that is known."""
        self.app = app
        self.metrics = metrics
        self.paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else OTHER
        try:
            await self.app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - began
            self.metrics.requests.labels(method, self._route(scope), status).observe(seconds)

    def _route(self, scope: Scope) -> str:
        route = scope.get("route")
        if route is not None:
            return str(route.path)
        return scope["path"] if scope["path"] in self.paths else OTHER
