"""A step that hangs: its lease lapses, others do the job, and what the hung worker still writes is refused."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.registry.database import Registry
from service.registry.jobs import request_cancel, take_back_expired
from service.registry.tables import Job, JobState, SampleJob, TuningJob
from tests.stack import wait_until
from tests.worker.in_process import InProcess
from worker import lease as leases
from worker.lease import HANG_FACTOR, Lease, StepWatch
from worker.runtime import Runtime

LEASE_SECONDS, STEP_SECONDS, MAX_STEP_SECONDS = 0.6, 0.3, 0.8


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the process would end."""
    ended = threading.Event()
    monkeypatch.setattr(leases, "end_process", ended.set)
    return ended


@pytest.fixture
def worker(registry: Registry, tmp_path: Path) -> Iterator[InProcess]:
    seconds = {"step_seconds": STEP_SECONDS, "max_step_seconds": MAX_STEP_SECONDS, "lease_seconds": LEASE_SECONDS}
    worker = InProcess(tmp_path, registry, **seconds)
    yield worker
    worker.close()


@contextmanager
def hanging(worker: InProcess, model_id: str) -> Iterator[None]:
    """The first call of the network hangs until the end of the context, and samples are served meanwhile."""
    model = worker.runtime.load_model(model_id)
    calls, released = 0, threading.Event()

    def network(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            assert released.wait(60)
        answer: Tensor = model.network(*args)
        return answer

    worker.runtime._models[model_id, torch.float32] = replace(model, network=network)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        worker.runtime._models[model_id, torch.float32] = model


def taken_back(registry: Registry, job_class: type[Job], job_id: str) -> bool:
    with registry.write() as session:
        take_back_expired(session, job_class, 5)
        return session.get_one(job_class, job_id).state != JobState.RUNNING


def test_a_job_whose_step_hangs_is_done_by_another_worker_and_only_once(
    worker: InProcess, registry: Registry, ended: threading.Event
) -> None:
    model = worker.model("mixture-ring")
    job_id = worker.submit(model, seed=3)
    with hanging(worker, model):
        wait_until(lambda: worker.job(job_id).state == JobState.RUNNING, "start", 10)
        wait_until(lambda: taken_back(registry, SampleJob, job_id), "end of the lease", 10)
        assert ended.is_set()
        another = InProcess(worker.settings.timetuner_home, registry)
        another.serve()
        another.close()
        job = worker.job(job_id)
        assert (job.state, job.attempt, job.losses) == (JobState.SUCCEEDED, 2, 1)
    after = worker.job(job_id)
    assert (after.artifact, after.finished_at) == (job.artifact, job.finished_at)


def test_a_job_whose_step_hangs_can_be_cancelled(worker: InProcess, registry: Registry, ended: threading.Event) -> None:
    model = worker.model("mixture-ring")
    job_id = worker.submit(model)
    with hanging(worker, model):
        wait_until(lambda: worker.job(job_id).state == JobState.RUNNING, "start", 10)
        with registry.write() as session:
            request_cancel(session, session.get_one(SampleJob, job_id))
        wait_until(lambda: taken_back(registry, SampleJob, job_id), "end of the lease", 10)
        assert worker.job(job_id).state == JobState.CANCELLED
    assert worker.job(job_id).state == JobState.CANCELLED


def test_a_tuning_job_is_held_while_its_steps_end_and_lost_when_one_hangs(
    worker: InProcess, registry: Registry, model_id: str, ended: threading.Event
) -> None:
    with registry.write() as session:
        session.add(TuningJob(id="job_1", model_id=model_id, request={}))

    def work(_runtime: Runtime, lease: Lease) -> None:
        for _ in range(12):  # Twice as long as the lease.
            lease.check()
            assert not taken_back(registry, TuningJob, "job_1")
            time.sleep(0.1)
        with lease.watch.paused():  # Samples go first.
            time.sleep(2 * MAX_STEP_SECONDS)
        assert not ended.is_set()
        wait_until(lambda: taken_back(registry, TuningJob, "job_1"), "end of the lease", 10)
        lease.check()

    worker.runtime.run(TuningJob, "job_1", work)
    assert ended.is_set()
    with registry.read() as session:
        job = session.get_one(TuningJob, "job_1")
        assert (job.state, job.losses) == (JobState.QUEUED, 1)


def test_a_steps_limit_grows_with_what_steps_have_taken_and_has_a_bound() -> None:
    now = 0.0
    watch = StepWatch(30, 200, lambda: now)

    def step(seconds: float) -> None:
        nonlocal now
        now += seconds
        assert not watch.hangs
        watch.advance()

    for seconds, limit in ((1, 200), (2, 30), (5, HANG_FACTOR * 5), (1, HANG_FACTOR * 5), (50, 200), (199, 200)):
        step(seconds)
        assert watch.limit == limit
    with watch.slow():
        now += 150
    now += 200
    assert not watch.hangs
    now += 1
    assert watch.hangs


def test_a_slow_step_has_the_longest_limit_and_says_nothing_of_others() -> None:
    now = 0.0
    watch = StepWatch(30, 200, lambda: now)
    for _ in range(3):
        watch.advance()
    with watch.slow():
        now += 199
        assert not watch.hangs
    now += 31
    assert watch.hangs
