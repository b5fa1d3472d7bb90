"""Retention: delete old samples, and files that no job refers to."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import delete
from sqlalchemy.orm import Session
from ulid import ULID

from service.registry.database import Registry
from service.registry.models import old_registrations
from service.registry.old_rows import delete_old_audit, delete_old_events, delete_old_rejected
from service.registry.samples import delete_old_samples, unreferenced
from service.registry.stored_bytes import bytes_ever_taken, enter_count, give_back_bytes, stored_bytes
from service.registry.tables import IdempotencyKey
from service.registry.types import utc_now
from service.shared.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
ROWS_PER_TRANSACTION = 500  # Short transactions keep other writers from waiting for the sweeper.
# Jobs are not reused beyond `keep_days`. The grace time lets transactions end that began to refer to an old job.
GRACE = timedelta(hours=1)
# Samples are deleted early once more than the first share of the quota is taken, until no more than the second is.
# Those whose clients may be fetching them stay.
CROWDED, AFTER_CROWDED = 0.9, 0.8
LEAST_KEPT = timedelta(minutes=10)
ROWS_PER_ROUND = 100
PARTIAL_GRACE = timedelta(days=1)  # Storing a file takes less.

# A function that deletes some rows that are older than a time. It is given the time, the most rows to look at, and what
# its last call returned: the place to go on from, None if there is no more.
Delete = Callable[[Session, datetime, int, Any], Any]


class SweepError(ExceptionGroup):
    """Something that is old could not be deleted, for these reasons."""


class Sweeper:
    """Deletes requests for samples `keep_days` after they ended, and then their files. 0 keeps all.

    Idempotency keys of the same age are deleted, too, and so are files that no job refers to: their worker was lost
    before it could store how the job ended. Any number of sweepers may run at the same time.
    """

    def __init__(
        self,
        registry: Registry,
        artifacts: ArtifactStore,
        keep_days: float,
        *,
        keep_events_days: float = 0,
        keep_rejected_days: float = 0,
        keep_audit_days: float = 0,
        max_stored_bytes: int = 0,
    ) -> None:
        self._registry, self._artifacts = registry, artifacts
        self._keep, self._most = timedelta(days=keep_days), max_stored_bytes
        # What is deleted from the registry by an age of its own.
        self._by_age: list[tuple[timedelta, Delete]] = [
            (timedelta(days=keep_events_days), delete_old_events),
            (timedelta(days=keep_rejected_days), delete_old_rejected),
            (timedelta(days=keep_audit_days), delete_old_audit),
        ]
        self._swept_at = -float("inf")
        self._foreign: set[str] = set()  # Files that are not ours, each of which is logged once.

    def sweep_if_due(self) -> None:
        """Sweep once a minute. Raises: SweepError, if some of it could not be done."""
        if time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            now = utc_now()
            parts = [partial(self._delete_partial_files, now - PARTIAL_GRACE)]
            parts += [partial(self._delete_rows_by_age, rows, now - age) for age, rows in self._by_age if age]
            if self._keep:
                parts.append(partial(self.sweep, now - self._keep - GRACE))
            if self._most:
                parts.append(partial(self._count_bytes))
            self._do(parts)

    def sweep(self, before: datetime) -> None:
        """Delete what belongs to samples and is older. Raises: SweepError, if some of it could not be deleted."""
        parts = (self._delete_keys, self._delete_registrations, self._delete_samples, self._delete_files)
        self._do(partial(part, before) for part in parts)

    def make_room(self) -> None:
        """Delete the oldest samples before their time, once nearly all bytes are taken that may be stored.

        This looks at one row, unless there is something to delete. Samples that are kept for ever are not deleted.
        """
        if not self._most or not self._keep:
            return
        with self._registry.read() as session:
            left = stored_bytes(session)
        if left <= CROWDED * self._most:
            return
        files = 0
        while left > AFTER_CROWDED * self._most:
            with self._registry.write() as session:
                deleted = delete_old_samples(session, utc_now() - LEAST_KEPT, ROWS_PER_ROUND)
                unneeded = unreferenced(session, {file for file in deleted if file})
            if not deleted:
                break
            freed = sum(self._remove(file) for file in unneeded)
            with self._registry.write() as session:
                give_back_bytes(session, freed)
            left, files = left - freed, files + len(unneeded)
        if files:
            logger.warning(
                "deleted %d files of samples early, as MAX_STORED_BYTES=%d is nearly used up", files, self._most
            )

    def _remove(self, file: str) -> int:
        """Delete a file. Returns its size."""
        size = self._artifacts.size(file)
        self._artifacts.remove(file)
        return size

    def _count_bytes(self) -> None:
        with self._registry.read() as session:
            taken_before = bytes_ever_taken(session)
        counted = self._artifacts.size()
        with self._registry.write() as session:
            enter_count(session, counted, taken_before)

    def _do(self, parts: Iterable[Callable[[], None]]) -> None:
        """Do all parts. Raises: SweepError, with the errors of those that failed."""
        errors = []
        for part in parts:
            try:
                part()
            except Exception as error:  # The database or the artifacts are away, or something there is broken.
                errors.append(error)
        if errors:
            raise SweepError("not all that is old could be deleted", errors)

    def _delete_rows_by_age(self, delete_rows: Delete, before: datetime) -> None:
        after: Any = None
        while True:
            with self._registry.write() as session:
                after = delete_rows(session, before, ROWS_PER_TRANSACTION, after)
            if after is None:
                return

    def _delete_partial_files(self, before: datetime) -> None:
        """Delete files whose processes ended while they stored them."""
        for key in self._artifacts.partial_files(before):
            self._artifacts.remove(key)

    def _delete_keys(self, before: datetime) -> None:
        with self._registry.write() as session:
            session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < before))

    def _delete_samples(self, before: datetime) -> None:
        if rows := sum(self._delete_rows(before)):
            logger.info("deleted %d samples", rows)

    def _delete_files(self, before: datetime) -> None:
        """Delete old files that no job refers to. One that cannot be deleted does not keep the others."""
        old = [key for key in self._artifacts.files("samples") if (made := self._made_at(key)) and made < before]
        files, errors = 0, []
        for first in range(0, len(old), ROWS_PER_TRANSACTION):
            with self._registry.read() as session:
                unneeded = unreferenced(session, old[first : first + ROWS_PER_TRANSACTION])
            for key in unneeded:
                try:
                    self._artifacts.remove(key)
                    files += 1
                except OSError as error:
                    errors.append(error)
        if files:
            logger.info("deleted %d files", files)
        if errors:
            raise SweepError(f"{len(errors)} files could not be deleted", errors)

    def _made_at(self, key: str) -> datetime | None:
        """The time at which a file of samples was made, which its name holds. None for a file that is not ours."""
        try:
            return ULID.from_str(key.rpartition("/")[2].removesuffix(".npy")).datetime
        except ValueError:
            if key not in self._foreign:
                logger.warning("%s is no file of samples, and stays", key)
                self._foreign.add(key)
            return None

    def _delete_registrations(self, before: datetime) -> None:
        """Delete old registrations, and the files of those that did not become models."""
        with self._registry.write() as session:
            found = old_registrations(session, before, ROWS_PER_TRANSACTION)
            for registration, _ in found:
                session.delete(registration)
        for registration, has_model in found:
            if not has_model and registration.artifact is not None:
                self._artifacts.remove(registration.artifact)

    def _delete_rows(self, before: datetime) -> Iterator[int]:
        """Delete rows in batches. Gives the size of each."""
        while True:
            with self._registry.write() as session:
                count = len(delete_old_samples(session, before, ROWS_PER_TRANSACTION))
            yield count
            if count == 0:
                return
