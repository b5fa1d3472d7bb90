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


class Sweeper:
    """Deletes requests for samples `keep_days` after they ended, and then their files. 0 keeps all.

    Idempotency keys of the same age are deleted, too, and so are files that no job refers to: their worker was lost
    before it could store how the job ended. Any number of sweepers may run at the same time.
    """

    def __init__(self, registry: Registry, artifacts: ArtifactStore, keep_days: float) -> None:
        self._registry, self._artifacts = registry, artifacts
        self._keep = timedelta(days=keep_days)
        self._swept_at = -float("inf")

    def sweep_if_due(self) -> None:
        if self._keep and time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self.sweep(utc_now() - self._keep - GRACE)
            self._swept_at = time.monotonic()

    def sweep(self, before: datetime) -> None:
        with self._registry.write() as session:
            session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < before))
        self._delete_registrations(before)
        rows = sum(self._delete_rows(before))
        old = [key for key in self._artifacts.files("samples") if _made_at(key) < before]
        files = 0
        for first in range(0, len(old), ROWS_PER_TRANSACTION):
            keys = old[first : first + ROWS_PER_TRANSACTION]
            with self._registry.read() as session:
                unneeded = unreferenced(session, keys)
            for key in unneeded:
                self._artifacts.remove(key)
            files += len(unneeded)
        if rows or files:
            logger.info("deleted %d samples and %d files", rows, files)

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


def _made_at(key: str) -> datetime:
    """The time at which a file of samples was made. Its name holds it."""
    return ULID.from_str(key.rpartition("/")[2].removesuffix(".npy")).datetime
