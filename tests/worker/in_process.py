"""A worker within the test's own process, without a broker: what is done to a batch can be watched and broken."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from ulid import ULID

from service.registry.database import Registry
from service.registry.tables import Model, SampleJob
from service.shared.artifacts import ArtifactStore
from service.shared.job_requests import SampleRequest
from service.shared.queue import celery_app
from service.shared.settings import Settings
from worker.runtime import Runtime
from worker.sampling import SampleServer

IDLE_SECONDS = 0.01
BROKER_URL = "redis://127.0.0.1:1/0"  # Nothing listens there.


class SilentBus:
    """A bus that nobody hears. It keeps what was published, and tells the worker of new jobs once a test rings it."""

    def __init__(self) -> None:
        self.published: list[Any] = []
        self.marks: set[str] = set()
        self._rung = threading.Event()

    def publish(self, event: Any) -> None:
        self.published.append(event)

    def publish_ends(self, ends: Any) -> None:
        self.published += list(ends)

    def announce_samples(self) -> None: ...

    def announce_models(self) -> None: ...

    def request_worker(self) -> None: ...

    def mark_warming(self, place: str) -> bool:
        is_new = place not in self.marks
        self.marks.add(place)
        return is_new

    def unmark_warming(self, place: str) -> None:
        self.marks.discard(place)

    def worker_started(self) -> None: ...

    def is_worker_requested(self) -> bool:
        return False

    def ring(self) -> None:
        self._rung.set()

    def has_message(self, seconds: float = 0.0) -> bool:
        rung = self._rung.wait(min(seconds, IDLE_SECONDS))
        if rung:  # One that comes after the wait is for the next call.
            self._rung.clear()
        return rung

    @contextmanager
    def subscribe_to_work(self) -> Iterator["SilentBus"]:
        yield self


class InProcess:
    """A worker, its registry and its artifacts."""

    def __init__(self, folder: Path, registry: Registry, **settings: Any) -> None:
        url = registry.url.render_as_string(hide_password=False)
        defaults = {"timetuner_home": folder, "device": "cpu", "same_bits": False, "database_url": url}
        self.settings = Settings(**defaults | {"broker_url": BROKER_URL} | settings)
        self.registry = registry
        self.bus = SilentBus()
        self.runtime = Runtime(self.settings, celery_app(BROKER_URL))
        self.runtime.bus = cast(Any, self.bus)
        self.artifacts: ArtifactStore = self.runtime.artifacts

    def close(self) -> None:
        self.runtime.registry.close()

    def model(self, builtin: str) -> str:
        with self.registry.write() as session:
            model = Model(name=builtin, content_hash=builtin, source={"builtin": builtin}, spec={})
            session.add(model)
        return model.id

    def submit(
        self,
        model_id: str,
        *,
        owner: str | None = None,
        priority: int = 0,
        schedule_id: str | None = None,
        **request: Any,
    ) -> str:
        """A queued sampling job, as the API stores it, but that it is never split."""
        body = SampleRequest(**{"model": model_id, "num_steps": 3, **request})
        with self.registry.write() as session:
            job = SampleJob(
                id=f"smp_{ULID()}",
                owner=owner,
                model_id=model_id,
                schedule_id=schedule_id,
                request=body.model_dump(mode="json"),
                request_hash="",
                num_images=body.num_images,
                priority=priority,
            )
            session.add(job)
        return job.id

    def serve(self) -> None:
        """Sample until there are no jobs."""
        SampleServer(self.runtime, IDLE_SECONDS).serve()

    def job(self, job_id: str) -> SampleJob:
        with self.registry.read() as session:
            return session.get_one(SampleJob, job_id)

    def images(self, job_id: str) -> NDArray[np.float32]:
        """The images of a job, which has succeeded."""
        job = self.job(job_id)
        assert job.artifact is not None, f"{job_id} has {job.state}: {job.error}"
        return self.artifacts.get_rows(job.artifact, job.artifact_row, job.num_images)
