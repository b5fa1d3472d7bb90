"""A worker runs the tuning job whose turn it is, whichever its message names."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.registry.database import Registry
from service.registry.tables import JobState, TuningJob
from tests.worker.in_process import InProcess
from worker.lease import Lease
from worker.runtime import Runtime


@pytest.fixture
def worker(registry: Registry, tmp_path: Path) -> Iterator[InProcess]:
    worker = InProcess(tmp_path, registry)
    yield worker
    worker.close()


def test_messages_of_one_keys_flood_run_the_jobs_of_others_too(
    worker: InProcess, registry: Registry, model_id: str
) -> None:
    owners = ["key_a"] * 3 + ["key_b"]
    with registry.write() as session:
        for k, owner in enumerate(owners):
            session.add(TuningJob(id=f"job_{k}", owner=owner, model_id=model_id, request={}))
    run: list[str] = []

    def work(_runtime: Runtime, lease: Lease) -> None:
        run.append(lease.claim.job_id)
        with lease.write() as (_session, job):
            job.state = JobState.SUCCEEDED

    for k in range(len(owners)):
        assert worker.runtime.run(TuningJob, f"job_{k}", work)
    assert run == ["job_0", "job_3", "job_1", "job_2"]
    assert not worker.runtime.run(TuningJob, "job_0", work)
