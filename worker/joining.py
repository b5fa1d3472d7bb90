"""Joining the parts of large sampling requests."""

import logging
from collections.abc import Iterable

from ulid import ULID

from service.registry.database import Registry
from service.registry.samples import Ended, join_parts
from service.shared.artifacts import ArtifactStore

logger = logging.getLogger(__name__)


def join_all(registry: Registry, artifacts: ArtifactStore, parent_ids: Iterable[str]) -> list[Ended]:
    """Update requests that were split from the states of their parts. Returns the ends of those that are over.

    A request whose images cannot be stored stays as it is, and the dispatcher tries again.
    """

    def join(places: list[tuple[str, int, int]]) -> str:
        import numpy as np  # Only a process that joins something needs it.

        artifact = f"samples/{ULID()}.npy"
        artifacts.put_array(artifact, np.concatenate([artifacts.get_rows(*place) for place in places]))
        return artifact

    over = []
    for parent_id in sorted(parent_ids):
        try:
            with registry.write() as session:
                ended = join_parts(session, parent_id, join)
        except OSError:
            logger.exception("the images of %s cannot be joined", parent_id)
            continue
        over += [ended] if ended else []
    return over
