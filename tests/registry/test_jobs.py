"""The life of a job: one worker at a time, taken back from the dead, never written by them again."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from threading import Barrier
from typing import TypeVar

import pytest
from sqlalchemy import func, select

from service.http.errors import TooManyRequestsError
from service.registry.database import Registry
from service.registry.jobs import (
    Claim,
    LeaseLostError,
    add_tasks,
    claim,
    finish,
    hand_back,
    mark_published,
    next_tuning_jobs,
    renew,
    request_cancel,
    take_back_expired,
    unpublished,
)
from service.registry.schedules import next_version
from service.registry.tables import (
    JobState,
    Model,
    Schedule,
    ScheduleStatus,
    TuningJob,
    TuningJobEvent,
    TuningTask,
)
from service.registry.types import utc_now
from service.request_checks import check_room

pytestmark = pytest.mark.both_engines

LEASE_SECONDS = 60.0
EXPIRED = -1.0  # a lease that is over as soon as it is given
MAX_ATTEMPTS = 3
THREADS = 6

Result = TypeVar("Result")


def add_job(registry: Registry, model_id: str) -> str:
    with registry.write() as session:
        job = TuningJob(model_id=model_id, request={})
        session.add(job)
    return job.id


@pytest.fixture
def job_id(registry: Registry, model_id: str) -> str:
    return add_job(registry, model_id)


def take(registry: Registry, job_id: str, lease_seconds: float = LEASE_SECONDS, owner: str = "w") -> Claim | None:
    with registry.write() as session:
        return claim(session, TuningJob, job_id, owner, lease_seconds)


def taken(registry: Registry, job_id: str, lease_seconds: float = LEASE_SECONDS) -> Claim:
    claimed = take(registry, job_id, lease_seconds)
    assert claimed is not None
    return claimed


def take_back(registry: Registry) -> None:
    with registry.write() as session:
        take_back_expired(session, TuningJob, MAX_ATTEMPTS)


def cancel(registry: Registry, job_id: str) -> None:
    with registry.write() as session:
        request_cancel(session, session.get_one(TuningJob, job_id))


def end(registry: Registry, claimed: Claim, state: JobState = JobState.SUCCEEDED) -> None:
    with registry.write() as session:
        finish(session, renew(session, claimed, LEASE_SECONDS), state)


def read(registry: Registry, job_id: str) -> TuningJob:
    with registry.read() as session:
        return session.get_one(TuningJob, job_id)


def events(registry: Registry, job_id: str) -> list[str]:
    with registry.read() as session:
        query = select(TuningJobEvent.type).where(TuningJobEvent.job_id == job_id).order_by(TuningJobEvent.id)
        return list(session.scalars(query))


def at_once(work: Callable[[int], Result]) -> list[Result]:
    """The results of `work(k)` in threads that all set out together."""
    barrier = Barrier(THREADS)

    def run(k: int) -> Result:
        barrier.wait()
        return work(k)

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(run, range(THREADS)))


@pytest.mark.parametrize("abandoned", [False, True])
def test_of_many_claimers_one_gets_the_job(registry: Registry, job_id: str, abandoned: bool) -> None:
    if abandoned:
        taken(registry, job_id, EXPIRED)
    claims = at_once(lambda k: take(registry, job_id, owner=f"worker {k}"))
    winners = [k for k, claimed in enumerate(claims) if claimed]
    assert len(winners) == 1
    job = read(registry, job_id)
    assert (job.lease_owner, job.attempt) == (f"worker {winners[0]}", 1 + abandoned)


def test_a_running_job_is_left_to_its_worker(registry: Registry, job_id: str) -> None:
    taken(registry, job_id)
    assert take(registry, job_id) is None
    take_back(registry)
    assert read(registry, job_id).state == JobState.RUNNING


def test_a_job_whose_lease_ran_out_is_queued_again_and_its_old_worker_can_write_nothing(
    registry: Registry, job_id: str
) -> None:
    old = taken(registry, job_id, EXPIRED)
    with registry.write() as session:
        mark_published(session, TuningJob, [job_id])
    take_back(registry)
    job = read(registry, job_id)
    assert (job.state, job.lease_owner, job.published_at) == (JobState.QUEUED, None, None)
    with pytest.raises(LeaseLostError):
        end(registry, old)

    new = taken(registry, job_id)
    with pytest.raises(LeaseLostError):
        end(registry, old)
    assert read(registry, job_id).state == JobState.RUNNING
    end(registry, new)
    assert read(registry, job_id).state == JobState.SUCCEEDED
    assert events(registry, job_id) == ["started", "requeued", "started", "succeeded"]


def test_what_a_fenced_worker_wrote_in_its_transaction_is_undone(registry: Registry, job_id: str) -> None:
    old = taken(registry, job_id, EXPIRED)
    taken(registry, job_id)
    with pytest.raises(LeaseLostError), registry.write() as session:
        session.add(TuningJobEvent(job_id=job_id, type="progress", data={}))
        session.flush()
        renew(session, old, LEASE_SECONDS)
    assert events(registry, job_id) == ["started", "started"]


def test_renewing_keeps_a_lease_from_running_out(registry: Registry, job_id: str) -> None:
    claimed = taken(registry, job_id, EXPIRED)
    with registry.write() as session:
        renew(session, claimed, LEASE_SECONDS)
    take_back(registry)
    assert read(registry, job_id).state == JobState.RUNNING
    assert take(registry, job_id) is None


def test_a_job_that_lost_its_worker_too_often_is_parked_as_failed(registry: Registry, job_id: str) -> None:
    for _ in range(MAX_ATTEMPTS):
        taken(registry, job_id, EXPIRED)
        take_back(registry)
    job = read(registry, job_id)
    assert (job.state, job.attempt) == (JobState.FAILED, MAX_ATTEMPTS)
    assert "3 times" in str(job.error)
    assert take(registry, job_id) is None


def test_a_job_that_gets_on_in_between_may_lose_any_number_of_workers(registry: Registry, job_id: str) -> None:
    for _ in range(2 * MAX_ATTEMPTS):
        taken(registry, job_id, EXPIRED)
        take_back(registry)
        with registry.write() as session:
            session.get_one(TuningJob, job_id).losses = 0  # Saving does so, too.
    assert read(registry, job_id).state == JobState.QUEUED


def test_workers_that_were_lost_count_whoever_takes_the_job_from_them(registry: Registry, job_id: str) -> None:
    for _ in range(MAX_ATTEMPTS):
        taken(registry, job_id, EXPIRED)  # Each takes it from the one before, with no dispatcher in between.
    take_back(registry)
    assert read(registry, job_id).state == JobState.FAILED


def test_a_job_that_is_handed_back_is_queued_as_if_it_had_not_been_taken(registry: Registry, job_id: str) -> None:
    for _ in range(2 * MAX_ATTEMPTS):
        claimed = taken(registry, job_id)
        with registry.write() as session:
            hand_back(session, renew(session, claimed, LEASE_SECONDS))
    job = read(registry, job_id)
    assert (job.state, job.attempt, job.losses, job.lease_owner) == (JobState.QUEUED, 0, 0, None)
    with registry.read() as session:
        assert unpublished(session, TuningJob, timedelta(days=1)) == [job_id]
    with pytest.raises(LeaseLostError):
        end(registry, claimed)


def test_a_job_that_is_to_be_cancelled_is_not_handed_back_but_cancelled(registry: Registry, job_id: str) -> None:
    claimed = taken(registry, job_id)
    cancel(registry, job_id)
    with registry.write() as session:
        hand_back(session, renew(session, claimed, LEASE_SECONDS))
    assert read(registry, job_id).state == JobState.CANCELLED


def test_a_cancelled_queued_job_cannot_be_claimed(registry: Registry, job_id: str) -> None:
    cancel(registry, job_id)
    assert read(registry, job_id).state == JobState.CANCELLED
    assert take(registry, job_id) is None


def test_a_running_jobs_worker_is_told_of_the_cancellation_once(registry: Registry, job_id: str) -> None:
    claimed = taken(registry, job_id)
    cancel(registry, job_id)
    cancel(registry, job_id)
    with registry.write() as session:
        job = renew(session, claimed, LEASE_SECONDS)
        assert (job.state, job.cancel_requested) == (JobState.RUNNING, True)
    end(registry, claimed, JobState.CANCELLED)
    assert events(registry, job_id) == ["started", "cancel_requested", "cancelled"]


def test_a_cancelled_job_whose_worker_died_is_not_run_again(registry: Registry, job_id: str) -> None:
    taken(registry, job_id, EXPIRED)
    cancel(registry, job_id)
    take_back(registry)
    assert read(registry, job_id).state == JobState.CANCELLED


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_what_is_over_stays_as_it_is(registry: Registry, job_id: str, state: JobState) -> None:
    claimed = taken(registry, job_id)
    end(registry, claimed, state)
    cancel(registry, job_id)
    take_back(registry)
    assert take(registry, job_id) is None
    with pytest.raises(LeaseLostError):
        end(registry, claimed)
    job = read(registry, job_id)
    assert (job.state, job.lease_expires_at) == (state, None)
    assert job.finished_at is not None


def make_tasks(registry: Registry, claimed: Claim, count: int, lease_seconds: float = LEASE_SECONDS) -> list[str]:
    with registry.write() as session:
        job = renew(session, claimed, lease_seconds)
        assert isinstance(job, TuningJob)
        return add_tasks(session, job, list(range(count)))


def task_states(registry: Registry, task_ids: list[str]) -> list[tuple[str, bool]]:
    with registry.read() as session:
        tasks = [session.get_one(TuningTask, task_id) for task_id in task_ids]
        return [(task.state, task.cancel_requested) for task in tasks]


def test_a_jobs_tasks_are_made_once_whoever_takes_the_job_later(registry: Registry, job_id: str) -> None:
    first = make_tasks(registry, taken(registry, job_id), 2, EXPIRED)
    assert len(set(first)) == 2
    assert make_tasks(registry, taken(registry, job_id), 3)[:2] == first


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_no_task_is_left_to_run_once_its_job_is_over(registry: Registry, job_id: str, state: JobState) -> None:
    claimed = taken(registry, job_id)
    queued, running, done = make_tasks(registry, claimed, 3)
    with registry.write() as session:
        assert claim(session, TuningTask, running, "another", LEASE_SECONDS) is not None
        finish(session, session.get_one(TuningTask, done), JobState.SUCCEEDED)
    end(registry, claimed, state)
    assert task_states(registry, [queued, running, done]) == [
        (JobState.CANCELLED, False),
        (JobState.RUNNING, True),  # A worker will see it.
        (JobState.SUCCEEDED, False),
    ]
    with registry.write() as session:
        assert claim(session, TuningTask, queued, "another", LEASE_SECONDS) is None


def test_cancelling_a_job_cancels_its_tasks(registry: Registry, job_id: str) -> None:
    queued, running = make_tasks(registry, taken(registry, job_id), 2)
    with registry.write() as session:
        assert claim(session, TuningTask, running, "another", EXPIRED) is not None
    cancel(registry, job_id)
    assert task_states(registry, [queued, running]) == [(JobState.CANCELLED, False), (JobState.RUNNING, True)]
    with registry.write() as session:  # the other worker is gone
        take_back_expired(session, TuningTask, MAX_ATTEMPTS)
    assert task_states(registry, [running]) == [(JobState.CANCELLED, True)]


def test_the_broker_is_told_of_a_job_once_and_again_when_it_may_have_forgotten(
    registry: Registry, model_id: str
) -> None:
    first, second = (add_job(registry, model_id) for _ in range(2))

    def due(published_before: timedelta) -> list[str]:
        with registry.read() as session:
            assert session.scalar(select(func.count()).where(TuningJob.state == JobState.QUEUED)) == 2
            return unpublished(session, TuningJob, published_before)

    assert due(timedelta(days=1)) == [first, second]
    with registry.write() as session:
        mark_published(session, TuningJob, [first])
    assert due(timedelta(days=1)) == [second]
    assert due(timedelta(seconds=-1)) == [first, second]


def test_leases_and_messages_do_not_hang_on_the_clocks_of_workers_and_dispatchers(
    registry: Registry, model_id: str, monkeypatch: pytest.MonkeyPatch, wrong_by: timedelta
) -> None:
    held, published = (add_job(registry, model_id) for _ in range(2))
    with registry.write() as session:
        mark_published(session, TuningJob, [held, published])
    claimed = taken(registry, held)
    right = utc_now()
    for module in ("jobs", "types"):
        monkeypatch.setattr(f"service.registry.{module}.utc_now", lambda: right + wrong_by)
    take_back(registry)
    assert take(registry, held) is None
    with registry.write() as session:
        renew(session, claimed, LEASE_SECONDS)
    expires_at = read(registry, held).lease_expires_at
    assert expires_at is not None
    assert abs(expires_at - right - timedelta(seconds=LEASE_SECONDS)) < timedelta(seconds=LEASE_SECONDS / 2)
    with registry.read() as session:
        assert unpublished(session, TuningJob, timedelta(seconds=LEASE_SECONDS)) == []
        assert unpublished(session, TuningJob, timedelta(seconds=-1)) == [published]
    with registry.write() as session:
        renew(session, claimed, EXPIRED)
    take_back(registry)
    assert read(registry, held).state == JobState.QUEUED


def test_schedules_stored_at_the_same_time_get_different_versions(registry: Registry, model_id: str) -> None:
    key = {
        "model_id": model_id,
        "sampler": "ddim",
        "num_steps": 1,
        "guidance_type": "uncond",
        "guidance_scale": Decimal(1),
        "eta": Decimal(0),
    }

    def store(_: int) -> int:
        with registry.write() as session:
            version = next_version(session, key)
            values = {"timesteps": [1.0, 0.0], "t_ratios": [1.0], "provenance": {}}
            session.add(Schedule(**key, **values, version=version, status=ScheduleStatus.IMPORTED))
        return version

    assert sorted(at_once(store)) == list(range(1, THREADS + 1))


def test_the_version_of_a_deleted_schedule_is_not_given_again(registry: Registry, model_id: str) -> None:
    key = {
        "model_id": model_id,
        "sampler": "ddim",
        "num_steps": 1,
        "guidance_type": "uncond",
        "guidance_scale": Decimal(1),
        "eta": Decimal(0),
    }
    for expected in (1, 2, 3):
        with registry.write() as session:
            version = next_version(session, key)
            assert version == expected
            values = {"timesteps": [1.0, 0.0], "t_ratios": [1.0], "provenance": {}}
            schedule = Schedule(**key, **values, version=version, status=ScheduleStatus.IMPORTED)
            session.add(schedule)
            session.flush()
            session.delete(schedule)
    with registry.write() as session:
        session.delete(session.get_one(Model, model_id))  # and its counts


def test_keys_take_turns_at_tuning_however_many_jobs_one_of_them_has(registry: Registry, model_id: str) -> None:
    owners = ["key_a"] * 5 + ["key_b", "key_b", None]
    with registry.write() as session:
        for k, owner in enumerate(owners):
            session.add(TuningJob(id=f"job_{k}", owner=owner, model_id=model_id, request={}))
    order = []
    for _ in owners:
        with registry.write() as session:
            job_id = next_tuning_jobs(session)[0]
            claimed = claim(session, TuningJob, job_id, "w", 60)
            assert claimed is not None
            order.append(job_id)
        with registry.write() as session:  # One worker: nothing is running when it takes the next one.
            finish(session, session.get_one(TuningJob, job_id), JobState.SUCCEEDED)
    assert order == ["job_0", "job_5", "job_7", "job_1", "job_6", "job_2", "job_3", "job_4"]


def test_a_key_whose_jobs_are_being_run_waits_for_its_next_turn(registry: Registry, model_id: str) -> None:
    with registry.write() as session:
        for k, owner in enumerate(["key_a"] * 4 + ["key_b"] * 3):
            session.add(TuningJob(id=f"job_{k}", owner=owner, model_id=model_id, request={}))
    with registry.write() as session:
        for job_id in ("job_0", "job_1"):
            claim(session, TuningJob, job_id, "w", 60)
    with registry.read() as session:
        assert next_tuning_jobs(session) == ["job_4", "job_5", "job_6", "job_2", "job_3"]


def test_a_key_that_floods_the_queue_leaves_room_for_others(registry: Registry, model_id: str) -> None:
    def queued(owner: str | None) -> int:
        """How many more tuning jobs there is room for."""
        count = 0
        with registry.write() as session, pytest.raises(TooManyRequestsError):
            while True:
                check_room(session, 9, owner)
                session.add(TuningJob(owner=owner, model_id=model_id, request={}))
                session.flush()
                count += 1
        return count

    assert [queued(owner) for owner in ("flood", "flood", "late", "later", None)] == [5, 0, 2, 1, 1]
