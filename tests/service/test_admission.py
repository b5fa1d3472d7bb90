"""Whether there is room for a request for samples, and how long until there is."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.registry.database import Registry
from service.samples.admission import MAX_COUNT_AGE_SECONDS, Admission
from tests.conftest import MakeDatabaseUrl


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry(make_database_url: MakeDatabaseUrl, tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(make_database_url("sqlite", tmp_path))
    yield registry
    registry.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def served(admission: Admission, clock: Clock, *groups: int) -> None:
    """Jobs of one image each that end together by groups, one group every half second, while more wait."""
    for _ in range(sum(groups) + 1):
        with admission.admit(1):
            pass
    for group in groups:
        clock.now += 0.5
        admission.ended(group, group)


def test_jobs_that_end_together_are_not_taken_for_jobs_made_in_no_time(registry: Registry, clock: Clock) -> None:
    admission = Admission(registry, 1000, 1000, clock)
    served(admission, clock, *[4] * 6)
    assert admission.rate == pytest.approx(8)


def test_what_was_sampled_before_tells_nothing_of_the_rate(registry: Registry, clock: Clock) -> None:
    admission = Admission(registry, 1000, 1000, clock)
    served(admission, clock, 1, 1)
    with admission.admit(50):
        pass
    admission.spared(50)
    assert admission.rate == pytest.approx(2)


def test_jobs_on_their_way_into_the_registry_take_room_though_it_cannot_count_them_yet(
    registry: Registry, clock: Clock
) -> None:
    admission = Admission(registry, 2, 1000, clock)
    with admission.admit(1), admission.admit(1):
        clock.now += 2 * MAX_COUNT_AGE_SECONDS  # The registry is asked again then.
        assert asyncio.run(admission.refusal()) is not None
    clock.now += 2 * MAX_COUNT_AGE_SECONDS
    assert asyncio.run(admission.refusal()) is None  # they are not in the registry: nobody waits


def test_a_request_that_would_wait_too_long_is_told_when_it_would_not(registry: Registry, clock: Clock) -> None:
    admission = Admission(registry, 1000, 0.5, clock)
    asyncio.run(admission.refusal())  # looks, and finds nothing
    served(admission, clock, *[1] * 4)  # two a second, and one waits
    for _ in range(6):
        with admission.admit(1):
            pass
    clock.now -= 2.0  # The last look was just now, so there is no other.
    assert asyncio.run(admission.refusal()) == pytest.approx((7 - 0.5 * 2) / 2)


def test_a_lull_is_not_taken_for_time_in_which_jobs_were_served(registry: Registry, clock: Clock) -> None:
    admission = Admission(registry, 1000, 1000, clock)
    served(admission, clock, 1, 1, 1)  # and one is gone without a word: nobody waits
    clock.now += 60.0
    assert asyncio.run(admission.refusal()) is None
    with admission.admit(2):
        clock.now += 0.5
        admission.ended(1)
    assert admission.rate == pytest.approx(2)


def test_a_slow_rate_is_forgotten_once_nothing_has_ended_for_long(registry: Registry, clock: Clock) -> None:
    admission = Admission(registry, 1000, 60, clock)
    for _ in range(20):
        with admission.admit(5):
            pass
    admission.ended(5)
    clock.now += 100
    admission.ended(5)  # One image in 20 s: the 90 that are left would take half an hour.
    assert admission.rate == pytest.approx(0.05)
    assert admission._seconds_to_room() > 1000
    clock.now += 299
    assert admission.rate == pytest.approx(0.05)  # The next end is not yet missed.
    clock.now += 2
    assert admission.rate is None
    assert admission._seconds_to_room() == 0


def test_a_key_that_floods_the_queue_leaves_room_for_others(registry: Registry, clock: Clock) -> None:
    admission = Admission(registry, 9, 1000, clock)

    def admitted(key: str | None) -> int:
        """How many more requests of a key there is room for."""
        count = 0
        while admission._seconds_to_room(key) == 0:
            count += 1
            with admission.admit(1, key):
                pass
        return count

    assert [admitted(key) for key in ("flood", "flood", "late", "later")] == [5, 0, 2, 1]
    assert admitted(None) == 1  # All of the queue is anybody's where no keys are needed.


def test_a_key_has_its_share_of_the_time_that_requests_may_wait(registry: Registry, clock: Clock) -> None:
    admission = Admission(registry, 1000, 10, clock)
    served(admission, clock, *[1] * 4)  # Two a second, and one waits: 20 images are 10 seconds.
    with admission.admit(15, "flood"):
        pass
    assert admission._seconds_to_room("flood") == pytest.approx((16 + 15 - 20) / 2)
    assert admission._seconds_to_room("other") == 0
