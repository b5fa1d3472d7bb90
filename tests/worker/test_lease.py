"""Many workers at one job: what they write adds up, and stops when the job is over."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from service.registry.database import Registry
from service.registry.jobs import Claim, add_tasks, claim, finish, request_cancel
from service.registry.tables import JobState, TuningJob, TuningTask
from worker.lease import JobCancelledError, Lease

pytestmark = pytest.mark.both_engines

LEASE_SECONDS = 60.0
WORKERS, WRITES = 4, 10


@pytest.fixture
def job_id(registry: Registry, model_id: str) -> str:
    with registry.write() as session:
        job = TuningJob(model_id=model_id, request={})
        session.add(job)
    return job.id


@pytest.fixture
def claims(registry: Registry, job_id: str) -> list[Claim]:
    """Claims of one task each."""
    with registry.write() as session:
        task_ids = add_tasks(session, session.get_one(TuningJob, job_id), list(range(WORKERS)))
        taken = [claim(session, TuningTask, task_id, "w", LEASE_SECONDS) for task_id in task_ids]
    return [claimed for claimed in taken if claimed is not None]


def write(registry: Registry, claimed: Claim, job_id: str, writes: int) -> None:
    with Lease(registry, claimed, LEASE_SECONDS) as lease:
        for _ in range(writes):
            with lease.write_to(job_id) as (_session, job):
                job.network_calls += 1


def test_what_tasks_write_to_their_job_at_the_same_time_adds_up(
    registry: Registry, job_id: str, claims: list[Claim]
) -> None:
    with ThreadPoolExecutor(WORKERS) as threads:
        list(threads.map(lambda claimed: write(registry, claimed, job_id, WRITES), claims))
    with registry.read() as session:
        assert session.get_one(TuningJob, job_id).network_calls == WORKERS * WRITES


def test_a_job_that_is_ended_while_its_tasks_write_to_it_stops_them_all(
    registry: Registry, job_id: str, claims: list[Claim]
) -> None:
    with ThreadPoolExecutor(WORKERS) as threads:
        endless = [threads.submit(write, registry, claimed, job_id, 10**9) for claimed in claims]
        with registry.write() as session:
            finish(session, session.get_one(TuningJob, job_id, with_for_update=True), JobState.FAILED, "a step failed")
        for attempt in endless:
            with pytest.raises(JobCancelledError):
                attempt.result(timeout=60)


def test_a_workers_lease_tells_it_of_the_cancellation_of_the_job_it_helps_with(
    registry: Registry, job_id: str, claims: list[Claim]
) -> None:
    with Lease(registry, claims[0], lease_seconds=0.3) as lease:
        lease.check()
        with registry.write() as session:
            job = session.get_one(TuningJob, job_id, with_for_update=True)
            claim(session, TuningJob, job_id, "another", LEASE_SECONDS)
            request_cancel(session, job)
        with pytest.raises(JobCancelledError):
            while True:
                lease.check()
