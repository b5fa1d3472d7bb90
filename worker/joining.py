"""Joining the parts of large sampling requests."""

import itertools
import logging
from collections.abc import Iterable

from ulid import ULID

from service.registry.database import Registry
from service.registry.samples import Ended, fail_parent, join_parts
from service.registry.stored_bytes import NoRoomError, take_bytes
from service.shared.artifacts import ArtifactStore, DamagedArtifactError, bytes_of_rows

logger = logging.getLogger(__name__)


def join_all(
    registry: Registry, artifacts: ArtifactStore, parent_ids: Iterable[str], max_stored_bytes: int = 0
) -> list[Ended]:
    """Update requests that were split from the states of their parts. Returns the ends of those that are over.

    A request for which that fails stays as it is, and the dispatcher tries again. The others are joined.
    """
    over = []
    for parent_id in sorted(parent_ids):
        try:
            ended = join_one(registry, artifacts, parent_id, max_stored_bytes)
        except Exception:  # The database or the artifacts are away, or something there is broken.
            logger.exception("the images of %s cannot be joined", parent_id)
            continue
        over += [ended] if ended else []
    return over


def join_one(registry: Registry, artifacts: ArtifactStore, parent_id: str, max_stored_bytes: int = 0) -> Ended | None:
    """Update a request that was split from the states of its parts. Returns its end if it is over.

    If the images of a part are damaged, or the quota of the store has no room for all images, the request fails.
    """

    def join(places: list[tuple[str, int, int]]) -> str:
        artifact = f"samples/{ULID()}.npy"
        num_images = sum(count for _, _, count in places)
        first = artifacts.get_rows(*places[0])
        take_bytes(session, bytes_of_rows(num_images, first[0].nbytes), max_stored_bytes)
        others = (artifacts.get_rows(*place) for place in places[1:])
        artifacts.put_arrays(artifact, num_images, itertools.chain([first], others))
        return artifact

    try:
        with registry.write() as session:
            return join_parts(session, parent_id, join)
    except DamagedArtifactError as error:
        logger.exception("the images of %s cannot be joined", parent_id)
        with registry.write() as session:
            return fail_parent(session, parent_id, f"the images of a part were damaged: {error}")
    except NoRoomError as error:
        with registry.write() as session:
            return fail_parent(session, parent_id, f"the images could not be stored: {error}")
