"""Usage counts each job once, and is what the network was really asked."""

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.database import Registry
from service.registry.jobs import claim, finish, take_back_expired
from service.registry.samples import claim_samples, sample_again
from service.registry.tables import JobState, SampleJob, TuningJob, UsageTotal
from service.registry.usage import Payer, Use, add_usage
from service.shared.job_requests import TuningJobRequest
from tests.worker.in_process import InProcess
from worker.lease import Lease
from worker.tuning import run_tuning_job
from worker.usage import Meter, SharedMeter

pytestmark = pytest.mark.both_engines

MODEL, POINTS = "mixture-gratings", "mixture-ring"


@pytest.fixture
def worker(registry: Registry, tmp_path: Path) -> Iterator[InProcess]:
    worker = InProcess(tmp_path, registry, sample_batch_size=8)
    yield worker
    worker.close()


def totals(registry: Registry) -> dict[str | None, Use]:
    """The use by each key in all."""
    found: defaultdict[str | None, Use] = defaultdict(Use)
    with registry.read() as session:
        for row in session.scalars(select(UsageTotal)):
            found[row.owner] += Use(row.network_calls, row.network_rows, row.device_seconds)
    return dict(found)


def watch(worker: InProcess, model: str) -> list[int]:
    """The rows of each call of a model's network, from now on."""
    rows: list[int] = []
    worker.runtime._models[model, torch.float32] = worker.runtime.load_model(model).watched(rows.append)
    return rows


def test_jobs_that_share_calls_share_them_by_their_images_and_the_sums_are_the_calls(worker: InProcess) -> None:
    model = worker.model(MODEL)
    rows = watch(worker, model)
    jobs = [
        worker.submit(model, owner=owner, num_images=count, num_steps=steps, seed=10 * count)
        for owner, count, steps in (("key_a", 3, 4), ("key_b", 1, 4), (None, 2, 2))
    ]
    began = time.monotonic()
    worker.serve()
    took = time.monotonic() - began
    assert {worker.job(job).state for job in jobs} == {JobState.SUCCEEDED}
    used = totals(worker.registry)
    # All six images take the first two steps together, the four of both keys the last two.
    assert rows == [6, 6, 4, 4]
    assert {owner: use.network_rows for owner, use in used.items()} == pytest.approx(
        {"key_a": 12.0, "key_b": 4.0, None: 4.0}
    )
    assert used["key_a"].network_calls == pytest.approx(2 * 3 / 6 + 2 * 3 / 4)
    assert sum(use.network_calls for use in used.values()) == pytest.approx(4)
    seconds = [use.device_seconds for use in used.values()]
    assert min(seconds) > 0 and sum(seconds) < took


def test_guided_images_take_two_rows_a_step(worker: InProcess) -> None:
    worker.submit(
        worker.model(MODEL),
        num_images=2,
        num_steps=3,
        guidance_type="classifier-free",
        guidance_scale=2,
        class_labels=[0, 1],
    )
    worker.serve()
    assert totals(worker.registry)[None].network_rows == 12


def test_a_job_is_charged_by_the_worker_that_ends_it_and_no_other(worker: InProcess) -> None:
    job = worker.submit(worker.model(MODEL), num_steps=2)
    with worker.registry.write() as session:
        claim_samples(session, "a worker that is lost", -1.0, 8, [], only_these=False)
    with worker.registry.write() as session:
        take_back_expired(session, SampleJob, 3)
    assert totals(worker.registry) == {}
    worker.serve()
    assert totals(worker.registry)[None].network_rows == 2
    with worker.registry.write() as session:
        stored = session.get_one(SampleJob, job)
        sample_again(session, job, str(stored.artifact))  # The images were damaged.
    worker.serve()
    assert (worker.job(job).state, worker.job(job).attempt) == (JobState.SUCCEEDED, 3)
    assert totals(worker.registry)[None].network_rows == 2


def test_totals_are_those_of_a_day_key_model_and_kind(registry: Registry) -> None:
    one = Payer("key_a", "mdl_1", "sampling")  # type: ignore[arg-type]
    with registry.write() as session:
        add_usage(session, [(one, Use(1, 2, 0.5)), (one, Use(1, 2, 0.5)), (one._replace(owner=None), Use(1, 1, 1))])
        add_usage(session, [(one._replace(model_id="mdl_2"), Use(7)), (one, Use())])
    with registry.write() as session:
        add_usage(session, [(one, Use(0, 3, 0.25))])
    with registry.read() as session:
        rows = session.scalars(select(UsageTotal)).all()
    found = {(row.owner, row.model_id): (row.network_calls, row.network_rows, row.device_seconds) for row in rows}
    assert found == {("key_a", "mdl_1"): (2, 7, 1.25), (None, "mdl_1"): (1, 1, 1), ("key_a", "mdl_2"): (7, 0, 0)}


@pytest.fixture
def client(worker: InProcess) -> Iterator[TestClient]:
    with TestClient(create_app(worker.settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        yield client


TUNERS: list[dict[str, Any]] = [
    {"total_iters": 2, "population_size": 16, "teacher_num_steps": 4},
    {"objective": "next_eps", "tune_type": "parallel", "spread": True, "data": "generated", "population_size": 16}
    | {"total_iters": 2, "teacher_num_steps": 4},
]


@pytest.mark.parametrize("tuner", TUNERS, ids=["by one worker", "a task for each step"])
def test_a_tuning_job_is_charged_all_its_calls_once(worker: InProcess, client: TestClient, tuner: Any) -> None:
    model = client.post("/v1/models", json={"builtin": POINTS}).json()["id"]
    rows = watch(worker, model)
    evaluation = {"num_samples": 16, "max_num_samples": 16, "teacher_num_steps": 8, "batch_size": 16}
    request = {"model": model, "num_steps": 2, "tuner": tuner, "evaluation": evaluation}
    job = client.post("/v1/tuning-jobs", json=request).json()["id"]
    began = time.monotonic()
    worker.runtime.run(TuningJob, job, run_tuning_job)
    took = time.monotonic() - began
    assert client.get(f"/v1/tuning-jobs/{job}").json()["state"] == "succeeded"
    [total] = client.get("/v1/usage").json()["items"]
    assert (total["network_calls"], total["network_rows"]) == (len(rows), sum(rows))
    assert (total["kind"], total["model"], total["model_name"], total["key"]) == ("tuning", model, POINTS, None)
    assert 0.5 * took < total["device_seconds"] <= took


def test_a_tuning_job_that_lost_its_worker_is_charged_once_for_all_that_was_stored(worker: InProcess) -> None:
    registry, model = worker.registry, worker.model(POINTS)
    request = TuningJobRequest.model_validate({"model": model, "num_steps": 2})
    with registry.write() as session:
        job = TuningJob(model_id=model, owner="key_a", request=request.model_dump(mode="json"))
        session.add(job)

    def attempt(seconds: float) -> Lease:
        with registry.write() as session:
            claimed = claim(session, TuningJob, job.id, "worker", seconds)
        assert claimed is not None
        return Lease(registry, claimed, seconds)

    lost = attempt(-1.0)
    lost.meter.count(5)
    with lost.write():
        pass
    lost.meter.count(100)  # Nobody stores these.
    with registry.write() as session:
        take_back_expired(session, TuningJob, 3)
    assert totals(registry) == {}
    last = attempt(60.0)
    last.meter.count(7, network_calls=2)
    with pytest.raises(RuntimeError), last.write():
        raise RuntimeError("what was not stored goes back to the meter")
    with last.write() as (session, row):
        finish(session, row, JobState.FAILED, "it failed")
    used = totals(registry)["key_a"]
    assert (used.network_calls, used.network_rows) == (3, 12)


def test_a_meter_that_is_paused_does_not_run() -> None:
    meter = Meter()
    with meter.paused():
        pass
    assert meter.take() == Use()
    meter.start()
    with meter.paused():
        time.sleep(0.05)
    time.sleep(0.01)
    assert 0.01 <= meter.take().device_seconds < 0.05


def test_seconds_are_shared_out_by_the_steps_since_images_arrived_last() -> None:
    meter = SharedMeter()
    for owners in ("ab", "b"):
        with meter.step(owners):
            time.sleep(0.01)
    with meter.waiting():
        time.sleep(0.02)
    seconds = meter.take("a").device_seconds, meter.take("b").device_seconds
    assert seconds[1] == pytest.approx(2 * seconds[0]) and sum(seconds) >= 0.04
    with meter.step("b"):
        meter.count(3)
    assert meter.take("a") == Use()
    assert (meter.take("b").network_rows, "b" in meter) == (3, False)
