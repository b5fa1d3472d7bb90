"""Leases: a worker holds a job by renewing its lease from a thread, and all its writes are fenced."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.registry.database import Registry, is_away
from service.registry.jobs import Claim, LeaseLostError, renew
from service.registry.samples import SampleClaim, renew_samples
from service.registry.tables import FINAL_STATES, Job, TuningJob
from service.registry.usage import Use, add_to_job
from worker.usage import Meter

logger = logging.getLogger(__name__)


RETRY_SECONDS = 0.5
HANG_FACTOR = 10  # A step may take this many times as long as the longest one before it.
HUNG_EXIT_STATUS = 70
# A tuning job's first step is all before its first network call. The second is that call, which may compile.
FIRST_STEPS = 2


class JobCancelledError(Exception):
    """A user asked for the job to be cancelled."""


class WorkerStoppingError(Exception):
    """The worker stops, so other workers take the job."""


class JobRefusedError(Exception):
    """What the job asks for cannot be done, through no fault of the worker."""


def end_process() -> None:
    """End the process at once: a thread that hangs in a library cannot be ended by itself."""
    logging.shutdown()
    os._exit(HUNG_EXIT_STATUS)


class StepWatch:
    """Whether a worker's steps advance.

    A step hangs once it takes more than `floor_seconds`, and more than `HANG_FACTOR` times as long as any before it;
    or more than `max_seconds` in any case. The first step, and those that are said to be slow, have `max_seconds`: they
    load models, compile networks or try batch sizes.
    """

    def __init__(self, floor_seconds: float, max_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._floor, self._max = floor_seconds, max(floor_seconds, max_seconds)
        self._clock = clock
        self._longest, self._began = 0.0, clock()
        self._slow, self._paused = True, 0
        self._steps = 0

    def advance(self) -> None:
        """A step has ended, and the next one begins."""
        now = self._clock()
        self._longest = max(self._longest, now - self._began)
        self._began = now
        self._steps += 1
        self._slow = self._steps < FIRST_STEPS

    @contextmanager
    def slow(self) -> Iterator[None]:
        """A step of its own, which may take up to `max_seconds`. How long it takes says nothing of others."""
        self.advance()
        self._slow = True
        try:
            yield
        finally:
            self._began, self._slow = self._clock(), self._steps < FIRST_STEPS

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile nothing hangs, because something else is watched."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._began = self._clock()

    @property
    def limit(self) -> float:
        """How many seconds the step at hand may take."""
        return self._max if self._slow else min(self._max, max(self._floor, HANG_FACTOR * self._longest))

    @property
    def hangs(self) -> bool:
        return not self._paused and self._clock() - self._began > self.limit


class Renewing:
    """Renews leases from a thread, every third of their time, while it is entered and the watched steps advance.

    If they do not, the leases are lost, and the process ends, so that others run the jobs and a new process the queue.
    """

    def __init__(self, registry: Registry, lease_seconds: float, watch: StepWatch | None = None) -> None:
        self._registry = registry
        self._seconds = lease_seconds
        self.watch = watch or StepWatch(math.inf, math.inf)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(min(self._seconds / 3, 1.0)):
            if self.watch.hangs and (held := self._held()):
                self._give_up()
                logger.critical(
                    "no step has ended for %.0f s: the process ends", self.watch.limit, extra={"job_ids": held}
                )
                end_process()
                return
            try:
                self._renew()
            except LeaseLostError:
                return
            except Exception:  # The database is away. The leases may not expire before it is back.
                logger.exception("cannot renew leases")

    def _renew(self) -> None:
        """Raises: LeaseLostError, when there is nothing left to renew."""
        raise NotImplementedError

    def _held(self) -> list[str]:
        """The ids of the jobs whose leases are renewed."""
        raise NotImplementedError

    def _give_up(self) -> None:
        """Take all leases for lost."""
        raise NotImplementedError


class Lease(Renewing):
    """A claimed job. Its lease is renewed every third of its time, while `check()` is called.

    `check()` raises once the job is lost or cancelled, or the worker is `stopping`. Each write to a tuning job stores
    what it used so far by the `meter`, renewals included.
    """

    def __init__(
        self,
        registry: Registry,
        claim: Claim,
        lease_seconds: float,
        stopping: threading.Event | None = None,
        watch: StepWatch | None = None,
    ) -> None:
        super().__init__(registry, lease_seconds, watch)
        self.claim = claim
        self.meter = Meter()
        self._stopping = stopping or threading.Event()
        self._lost = threading.Event()
        self._cancelled = threading.Event()

    def check(self) -> None:
        """Note that the job gets on. It is cheap enough for every network call.

        Raises:
            LeaseLostError, JobCancelledError, WorkerStoppingError.
        """
        self.watch.advance()
        if self._lost.is_set():
            raise LeaseLostError(self.claim.job_id)
        if self._cancelled.is_set():
            raise JobCancelledError(self.claim.job_id)
        if self._stopping.is_set():
            raise WorkerStoppingError(self.claim.job_id)

    def persist(self, write: Callable[[], object]) -> None:
        """Do a transaction, and retry while the database is away. Raises: the errors of `check` and of `write`."""
        while True:
            try:
                write()
                return
            except DBAPIError as error:
                if not is_away(error):
                    raise
                logger.warning("the database is away; trying again: %s", error.orig)
            self.check()
            time.sleep(RETRY_SECONDS)

    @contextmanager
    def write(self) -> Iterator[tuple[Session, Job]]:
        """A transaction that commits only if this worker still holds the job. Raises: LeaseLostError."""
        with self._charging() as charge, self._registry.write() as session:
            job = renew(session, self.claim, self._seconds)
            if isinstance(job, TuningJob):
                charge(job)
            yield session, job

    @contextmanager
    def write_to(self, tuning_job_id: str) -> Iterator[tuple[Session, TuningJob]]:
        """A transaction on a tuning job for the holder of one of its tasks.

        Raises:
            LeaseLostError: another worker holds the task.
            JobCancelledError: the job is over.
        """
        with self._charging() as charge, self._registry.write() as session:
            # All code locks the job before its tasks, which prevents deadlocks.
            job = session.get_one(TuningJob, tuning_job_id, with_for_update=True)
            if job.state in FINAL_STATES:
                raise JobCancelledError(tuning_job_id)
            renew(session, self.claim, self._seconds)
            charge(job)
            yield session, job

    @contextmanager
    def _charging(self) -> Iterator[Callable[[TuningJob], None]]:
        """A function that adds what the meter has to a job. What no transaction stored goes back to the meter."""
        taken = Use()

        def charge(job: TuningJob) -> None:
            nonlocal taken
            taken = self.meter.take()
            add_to_job(job, taken)

        try:
            yield charge
        except BaseException:
            self.meter.put_back(taken)
            raise

    def _renew(self) -> None:
        try:
            with self.write() as (_, job):
                if job.cancel_requested:
                    self._cancelled.set()
        except LeaseLostError:
            self._lost.set()
            raise

    def _held(self) -> list[str]:
        return [self.claim.job_id]

    def _give_up(self) -> None:
        self._lost.set()


class SampleLeases(Renewing):
    """The leases of all sampling jobs of a worker, renewed together. They tell which jobs were lost or cancelled."""

    def __init__(self, registry: Registry, lease_seconds: float, watch: StepWatch | None = None) -> None:
        super().__init__(registry, lease_seconds, watch)
        self._claims: dict[str, SampleClaim] = {}
        self._lock = threading.Lock()
        self._lost: set[str] = set()
        self._cancelled: set[str] = set()

    def add(self, claims: Iterable[SampleClaim]) -> None:
        with self._lock:
            self._claims |= {claim.job_id: claim for claim in claims}

    def drop(self, job_ids: Iterable[str]) -> None:
        """Stop renewing the leases of these jobs, because they are over."""
        with self._lock:
            for job_id in job_ids:
                self._claims.pop(job_id, None)

    def given_up(self) -> tuple[list[SampleClaim], list[SampleClaim]]:
        """The claims lost to other workers, and those to be cancelled, since the last call."""
        with self._lock:
            lost, self._lost = self._lost, set()
            cancelled, self._cancelled = self._cancelled, set()
            held = self._claims
            return [held[i] for i in lost if i in held], [held[i] for i in cancelled if i in held]

    def _renew(self) -> None:
        with self._lock:
            claims = list(self._claims.values())
        if not claims:
            return
        with self._registry.write() as session:
            lost, cancelled = renew_samples(session, claims, self._seconds)
        with self._lock:
            self._lost |= lost
            self._cancelled |= cancelled

    def _held(self) -> list[str]:
        with self._lock:
            return list(self._claims)

    def _give_up(self) -> None:
        with self._lock:
            self._lost |= set(self._claims)
