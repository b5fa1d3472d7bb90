"""Work that a key had begun ends when it is revoked: its jobs, and the streams that it follows."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.access.callers import Caller
from service.registry.database import Registry
from service.registry.keys import Scope, create_key, revoke_key
from service.registry.tables import JobState, SampleJob, TuningJob
from service.samples.job_events import JobEvents
from service.samples.waiting import stream_events
from service.shared.job_requests import SampleRequest
from service.shared.queue import celery_app
from service.tuning_jobs.endpoints import _stream
from service.tuning_jobs.following import TuningEvents
from tests.registry.conftest import model_id, registry  # noqa: F401
from tests.worker.in_process import BROKER_URL, InProcess
from worker.dispatcher import dispatch_once


@pytest.fixture
def key(registry: Registry) -> Any:  # noqa: F811
    with registry.write() as session:
        return create_key(session, "somebody", [Scope.ADMIN])[0]


def revoke(registry: Registry, key: Any) -> None:  # noqa: F811
    with registry.write() as session:
        revoke_key(session, key.id)


def add_jobs(registry: Registry, model_id: str, owner: str) -> None:  # noqa: F811
    request = SampleRequest(model=model_id, num_steps=1).model_dump(mode="json")
    common: dict[str, Any] = {"owner": owner, "model_id": model_id, "request": request}
    sampling = {"request_hash": "", "num_images": 1}
    with registry.write() as session:
        for state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
            session.add(TuningJob(id=f"job_{owner}_{state}", state=state, **common))
            session.add(SampleJob(id=f"smp_{owner}_{state}", state=state, **sampling, **common))
        whole = SampleJob(id=f"smp_{owner}_whole", num_parts=1, **sampling, **common)
        session.add(whole)
        session.flush()
        session.add(SampleJob(id=f"smp_{owner}_part", parent_id=whole.id, **sampling, **common))


@pytest.mark.both_engines
def test_jobs_of_a_revoked_key_are_cancelled_and_no_others(
    registry: Registry,  # noqa: F811
    model_id: str,  # noqa: F811
    key: Any,
    tmp_path: Path,
) -> None:
    add_jobs(registry, model_id, key.id)
    add_jobs(registry, model_id, "another")
    revoke(registry, key)
    worker = InProcess(tmp_path, registry)
    bus: Any = worker.bus
    dispatch_once(registry, worker.artifacts, celery_app(BROKER_URL), bus, 5, 30.0)
    worker.close()
    with registry.read() as session:
        jobs = [*session.query(TuningJob), *session.query(SampleJob)]
    cancelled = {job.id for job in jobs if job.state == JobState.CANCELLED}
    ended = ("job_{}_queued", "smp_{}_queued", "smp_{}_whole", "smp_{}_part")
    assert cancelled == {name.format(key.id) for name in ended}
    requested = {job.id for job in jobs if job.cancel_requested}
    assert requested == {f"job_{key.id}_running", f"smp_{key.id}_running"}


@pytest.mark.parametrize("kind", ["sampling", "tuning"])
def test_streams_of_a_revoked_key_end(
    registry: Registry,  # noqa: F811
    model_id: str,  # noqa: F811
    key: Any,
    kind: str,
) -> None:
    add_jobs(registry, model_id, "another")
    state: Any = SimpleNamespace(registry=registry)
    samples: Any = SimpleNamespace(events=JobEvents(BROKER_URL, lambda *_: None))
    caller = Caller(key)
    stream: AsyncIterator[Any]
    if kind == "sampling":
        stream = stream_events(state, samples, caller, "smp_another_running")
    else:
        stream = _stream(state, TuningEvents(registry), caller, "job_another_running", 0)

    async def follow() -> float:
        async def read() -> None:
            async for _ in stream:
                pass

        following = asyncio.create_task(read())
        await asyncio.sleep(0.5)
        assert not following.done()
        revoke(registry, key)
        revoked_at = time.monotonic()
        await asyncio.wait_for(following, 10)
        return time.monotonic() - revoked_at

    assert asyncio.run(follow()) < 5
