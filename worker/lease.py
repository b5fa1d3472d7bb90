"""Holding a job while working on it: the lease is renewed from a thread, writes are fenced."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from sqlalchemy.orm import Session

from service.registry.database import Registry
from service.registry.jobs import Claim, LeaseLostError, renew
from service.registry.tables import FINAL_STATES, Job, TuningJob

logger = logging.getLogger(__name__)


class JobCancelledError(Exception):
    """A user asked for the job to be cancelled."""


class Lease:
    """A claimed job. Renews its lease every third of it; `check()` raises once the job is lost or cancelled."""

    def __init__(self, registry: Registry, claim: Claim, lease_seconds: float) -> None:
        self.claim = claim
        self._registry = registry
        self._seconds = lease_seconds
        self._lost = threading.Event()
        self._cancelled = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Cheap enough for every network call. Raises: LeaseLostError, JobCancelledError."""
        if self._lost.is_set():
            raise LeaseLostError(self.claim.job_id)
        if self._cancelled.is_set():
            raise JobCancelledError(self.claim.job_id)

    @contextmanager
    def write(self) -> Iterator[tuple[Session, Job]]:
        """A transaction that commits only if the job is still ours. Raises: LeaseLostError."""
        with self._registry.write() as session:
            yield session, renew(session, self.claim, self._seconds)

    @contextmanager
    def write_to(self, tuning_job_id: str) -> Iterator[tuple[Session, TuningJob]]:
        """As `write`, for one of a tuning job's tasks to write to the job.

        Raises:
            LeaseLostError: the task is no longer ours. JobCancelledError: the job is over.
        """
        with self._registry.write() as session:
            job = session.get_one(TuningJob, tuning_job_id, with_for_update=True)  # before the task, as everyone does
            if job.state in FINAL_STATES:
                raise JobCancelledError(tuning_job_id)
            renew(session, self.claim, self._seconds)
            yield session, job

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(min(self._seconds / 3, 1.0)):
            try:
                with self.write() as (_, job):
                    if job.cancel_requested:
                        self._cancelled.set()
            except LeaseLostError:
                self._lost.set()
                return
            except Exception:  # the database is away: try again, the lease may outlast it
                logger.exception("cannot renew the lease of %s", self.claim.job_id)
