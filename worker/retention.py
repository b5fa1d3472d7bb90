"""Deleting samples that are not to be kept any longer, and files that nobody refers to."""

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
BATCH = 500  # rows, or files, at once: nobody should have to wait for the sweeper
GRACE = timedelta(hours=1)  # nobody begins to refer to what is older than the policy says; whoever began has ended


class Sweeper:
    """Deletes requests for samples `keep_days` after they were over, and then their files; 0: keeps all.

    Files of the same age that no job refers to, as a worker wrote them and was lost before it could say so, go too; so
    do idempotency keys.
    Any number may run at the same time.
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
        for first in range(0, len(old), BATCH):
            keys = old[first : first + BATCH]
            with self._registry.read() as session:
                unneeded = unreferenced(session, keys)
            for key in unneeded:
                self._artifacts.remove(key)
            files += len(unneeded)
        if rows or files:
            logger.info("deleted %d samples and %d files", rows, files)

    def _delete_registrations(self, before: datetime) -> None:
        """Delete what was handed in long ago, and the files that did not become a model's."""
        with self._registry.write() as session:
            found = old_registrations(session, before, BATCH)
            for registration, _ in found:
                session.delete(registration)
        for registration, has_model in found:
            if not has_model:
                self._artifacts.remove(registration.artifact)

    def _delete_rows(self, before: datetime) -> Iterator[int]:
        """How many, batch by batch."""
        while True:
            with self._registry.write() as session:
                count = delete_old_samples(session, before, BATCH)
            yield count
            if count == 0:
                return


def _made_at(key: str) -> datetime:
    """Of a file of samples: its name says so."""
    return ULID.from_str(key.rpartition("/")[2].removesuffix(".npy")).datetime
