"""Retention: delete old samples, and files that no job refers to."""

import logging
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy import delete
from ulid import ULID

from service.registry.database import Registry
from service.registry.models import old_registrations
from service.registry.samples import delete_old_samples, unreferenced
from service.registry.tables import IdempotencyKey
from service.registry.types import utc_now
from service.shared.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
ROWS_PER_TRANSACTION = 500  # Short transactions keep other writers from waiting for the sweeper.
# Jobs are not reused beyond `keep_days`. The grace time lets transactions end that began to refer to an old job.
GRACE = timedelta(hours=1)


class SweepError(ExceptionGroup):
    """Something that is old could not be deleted, for these reasons."""


class Sweeper:
    """Deletes requests for samples `keep_days` after they ended, and then their files. 0 keeps all.

    Idempotency keys of the same age are deleted, too, and so are files that no job refers to: their worker was lost
    before it could store how the job ended. Any number of sweepers may run at the same time.
    """

    def __init__(self, registry: Registry, artifacts: ArtifactStore, keep_days: float) -> None:
        self._registry, self._artifacts = registry, artifacts
        self._keep = timedelta(days=keep_days)
        self._swept_at = -float("inf")
        self._foreign: set[str] = set()  # Files that are not ours, each of which is logged once.

    def sweep_if_due(self) -> None:
        """Sweep once a minute. Raises: SweepError, if some of it could not be done."""
        if self._keep and time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            self.sweep(utc_now() - self._keep - GRACE)

    def sweep(self, before: datetime) -> None:
        """Delete what is older. Raises: SweepError, if some of it could not be deleted. All else is."""
        errors = []
        for part in (self._delete_keys, self._delete_registrations, self._delete_samples, self._delete_files):
            try:
                part(before)
            except Exception as error:  # The database or the artifacts are away, or something there is broken.
                errors.append(error)
        if errors:
            raise SweepError("not all that is old could be deleted", errors)

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
            if not has_model:
                self._artifacts.remove(registration.artifact)

    def _delete_rows(self, before: datetime) -> Iterator[int]:
        """Delete rows in batches. Gives the size of each."""
        while True:
            with self._registry.write() as session:
                count = delete_old_samples(session, before, ROWS_PER_TRANSACTION)
            yield count
            if count == 0:
                return
