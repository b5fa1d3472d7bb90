"""Storing results from a thread, while the network makes the next steps."""

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from ulid import ULID

from service.registry.samples import Ended, SampleClaim, ended, finish_samples
from service.registry.stored_bytes import take_bytes
from service.registry.tables import JobState
from service.registry.types import utc_now
from service.shared.artifacts import bytes_of_rows
from worker import metrics
from worker.joining import join_all
from worker.lease import SampleLeases
from worker.runtime import Runtime
from worker.traces import trace_samples

logger = logging.getLogger(__name__)

MAX_WAITING = 4  # The thread that samples waits while so many steps' results are not stored.

End = tuple[SampleClaim, Ended]


@dataclass(frozen=True)
class _HandedIn:
    """How jobs ended at one step.

    Attributes:
        images: `(rows, *image_shape)`; each end's `artifact_row` counts in them. None where no job has images.
    """

    ends: list[End]
    images: NDArray[np.float32] | None
    leases: SampleLeases | None
    at: datetime


class Results:
    """Stores how jobs ended. All that was handed in while the last results were stored shares a file and a transaction,
    so that a disk that is slower than the steps delays nobody."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = ThreadPoolExecutor(1, "results")
        self._lock = threading.Lock()
        self._waiting: list[_HandedIn] = []
        self._storing: list[Future[None]] = []

    @property
    def is_busy(self) -> bool:
        """Whether results are not stored yet."""
        return not all(future.done() for future in self._storing)

    def hand_in(self, ends: list[End], images: NDArray[np.float32] | None, leases: SampleLeases | None) -> None:
        """Have results stored. Waits while `MAX_WAITING` are not.

        Args:
            images: of the jobs that succeeded. Each end's `artifact_row` is its first row there.
            leases: they are dropped when the results are stored.
        """
        self._wait_for(MAX_WAITING - 1)
        with self._lock:
            self._waiting.append(_HandedIn(ends, images, leases, utc_now()))
        self._storing.append(self._thread.submit(self._store_waiting))

    def wait(self) -> None:
        """Wait until all results are stored."""
        self._wait_for(0)

    def _wait_for(self, at_most: int) -> None:
        self._storing = [future for future in self._storing if not future.done()]
        while len(self._storing) > at_most:
            self._storing.pop(0).result()

    def _store_waiting(self) -> None:
        """Store all that waits. Later calls find nothing left of it."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            with metrics.STORE.time():
                ends = self._store(waiting)
                over = {one.job_id for one in self.enter(ends, [])}
            for one in waiting:
                own = {claim.job_id for claim, _ in one.ends} & over
                trace_samples([(claim, end) for claim, end in ends if claim.job_id in own], one.at)
            for state in dict.fromkeys(end.state for _, end in ends):
                claims = [claim for claim, end in ends if end.state == state]
                logger.info("jobs ended", extra={"state": state.value, **ids_of(claims)})
        except Exception:
            logger.exception("results could not be stored")
        finally:  # If storing failed, the leases expire, and other workers run the jobs again.
            for one in waiting:
                if one.leases is not None:
                    one.leases.drop(claim.job_id for claim, _ in one.ends)

    def _store(self, waiting: Sequence[_HandedIn]) -> list[End]:
        """Store the images, those of one shape in one file. Returns all ends, with their files."""
        ends = [end for one in waiting if one.images is None for end in one.ends]
        with_images = [(one.ends, one.images) for one in waiting if one.images is not None]
        for shape in dict.fromkeys(images.shape[1:] for _, images in with_images):
            ends += self._store_in_one_file([pair for pair in with_images if pair[1].shape[1:] == shape])
        return ends

    def _store_in_one_file(self, handed_in: Sequence[tuple[list[End], NDArray[np.float32]]]) -> list[End]:
        """Returns the ends of the jobs, which fail if their images cannot be stored."""
        artifact = f"samples/{ULID()}.npy"
        ends: list[End] = []
        first = 0
        for own, images in handed_in:
            ends += [(c, replace(end, artifact=artifact, artifact_row=first + end.artifact_row)) for c, end in own]
            first += len(images)
        try:
            self._take_room(first, handed_in[0][1][0].nbytes)
            self._runtime.artifacts.put_arrays(artifact, first, (images for _, images in handed_in))
        except OSError as error:  # The disk is full, or the quota is used up.
            if len(handed_in) > 1:  # There may be room for some.
                return [end for one in handed_in for end in self._store_in_one_file([one])]
            logger.exception("the images of %d jobs could not be stored", len(ends), extra=ids_of(c for c, _ in ends))
            message = f"the images could not be stored: {error}"
            failed = [(claim, ended(claim.job, JobState.FAILED, error=message), end.used) for claim, end in ends]
            return [(claim, replace(end, used=used)) for claim, end, used in failed]
        return ends

    def _take_room(self, num_rows: int, row_bytes: int) -> None:
        """Count images that are about to be stored. Raises: NoRoomError, an OSError."""
        if most := self._runtime.settings.max_stored_bytes:
            with self._runtime.registry.write() as session:
                take_bytes(session, bytes_of_rows(num_rows, row_bytes), most)

    def enter(self, ends: list[End], others: Sequence[Ended]) -> list[Ended]:
        """Enter how jobs ended, join parts, and publish the ends. Returns all ends.

        Args:
            others: ends that are entered already.
        """
        if not ends and not others:
            return []
        with self._runtime.registry.write() as session:
            over = [*others, *finish_samples(session, ends)]
        parents = {one.parent_id for one in over if one.parent_id}
        most = self._runtime.settings.max_stored_bytes
        over += join_all(self._runtime.registry, self._runtime.artifacts, parents, most)
        metrics.samples_ended(over)
        self._runtime.bus.publish_ends(over)
        return over


def ids_of(claims: Iterable[SampleClaim]) -> dict[str, list[str | None]]:
    """The ids for a log line about these jobs."""
    pairs = [(claim.job_id, claim.request_id) for claim in claims]
    return {"job_ids": [job_id for job_id, _ in pairs], "request_ids": [request_id for _, request_id in pairs]}
