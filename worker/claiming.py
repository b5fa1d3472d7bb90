"""Claiming sampling jobs from a thread, while the network makes a step: a job joins the batch at the next one."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self

from sqlalchemy.exc import DBAPIError

from service.registry.samples import Ended, SampleClaim
from service.registry.tables import Schedule

LISTEN_SECONDS = 0.05  # A thread that listens for new jobs notices within this time that it is to end.


@dataclass(frozen=True)
class Taken:
    """The outcome of a claim.

    Attributes:
        schedules: those that the claimed jobs name, by id.
        late: the ends of jobs whose deadline had passed.
        more: whether there may be more jobs.
    """

    claims: Sequence[SampleClaim]
    schedules: dict[str, Schedule]
    late: Sequence[Ended]
    more: bool

    @property
    def num_images(self) -> int:
        return sum(claim.job.num_images for claim in self.claims)


class Subscription(Protocol):
    """Announcements of new jobs: see `signals.WorkSubscription`."""

    def has_message(self, seconds: float = 0.0) -> bool: ...


class Claim(Protocol):
    """Claims jobs of up to `room` images together, for a worker that has these models at work."""

    def __call__(self, room: int, at_work: frozenset[str]) -> Taken: ...


class Claimer:
    """A thread that claims jobs while it is entered, whenever seats are free and there may be jobs.

    The thread that samples offers the seats of the next step, and takes what was claimed. Jobs that were claimed and
    are not taken yet keep their seats, so no seat is given twice.

    Attributes:
        more: whether there may be jobs that are not claimed yet.
    """

    def __init__(self, claim: Claim, subscription: AbstractContextManager[Subscription]) -> None:
        self._claim, self._subscription = claim, subscription
        self._changed = threading.Condition()
        self._seats, self._at_work, self._is_new_offer = 0, frozenset[str](), False
        self._taken: list[Taken] = []
        self._error: Exception | None = None
        self._is_closed = False
        self.more = True
        self._thread = threading.Thread(target=self._run, name="claims", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Claim no more. Once this returns, `take` gives the last jobs, and `more` says whether any may be left."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def offer(self, seats: int, at_work: frozenset[str]) -> None:
        """Say how many seats the next step has for jobs that come, and which models are at work."""
        with self._changed:
            self._seats, self._at_work, self._is_new_offer = seats, at_work, True
            self._changed.notify_all()

    def take(self) -> list[Taken]:
        """Jobs claimed since the last call. Raises: the error of a claim. The next offer has it tried again."""
        with self._changed:
            taken, self._taken = self._taken, []
            self._seats -= sum(one.num_images for one in taken)
            self._at_work |= _models(taken)
            if not taken and self._error is not None:
                error, self._error = self._error, None
                raise error
            return taken

    def wait(self, seconds: float) -> bool:
        """Wait up to so long for something to take. Returns whether there is nothing, and no claim under way."""
        with self._changed:
            came = self._changed.wait_for(lambda: self._taken or self._error is not None, seconds)
            return not came and not self.more

    def _run(self) -> None:
        try:
            with self._subscription as work:
                while not self._is_closed:
                    if not self.more:
                        self._listen(work)
                    elif room := self._room():
                        self._claim_up_to(room)
                self.more = self.more or work.has_message()
        except Exception as error:  # The thread that samples raises it.
            self._put(error=error)

    def _listen(self, work: Subscription) -> None:
        if work.has_message(LISTEN_SECONDS):
            with self._changed:
                self.more = self._is_new_offer = True

    def _room(self) -> int:
        """Wait for free seats. An offer is tried once: a job that has no room there has none until the next offer."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or (self._is_new_offer and self._free > 0))
            self._is_new_offer = False
            return 0 if self._is_closed else self._free

    @property
    def _free(self) -> int:
        return self._seats - sum(one.num_images for one in self._taken)

    def _claim_up_to(self, room: int) -> None:
        with self._changed:
            at_work = self._at_work | _models(self._taken)
        try:
            self._put(self._claim(room, at_work))
        except DBAPIError as error:
            self._put(error=error)

    def _put(self, taken: Taken | None = None, error: Exception | None = None) -> None:
        with self._changed:
            if taken is not None:
                self._taken.append(taken)
                self.more = taken.more
            self._error = error
            self._changed.notify_all()


def _models(taken: Sequence[Taken]) -> set[str]:
    return {claim.job.model_id for one in taken for claim in one.claims}
