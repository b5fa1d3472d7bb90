"""No accepted job is lost and none is applied twice, whatever part of a deployment dies."""

import os
import signal
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from service.registry.tables import JobState, TuningJob, TuningTask
from tests.stack import QUICK, SMALLEST, Json, Stack, wait_until
from tests.worker.conftest import Undisturbed

# Long enough to be killed in the middle, many saves after its start and many before its end.
STEADY: Json = {
    "tuner": {"total_iters": 80, "population_size": 16, "teacher_num_steps": 10},
    "evaluation": SMALLEST,
}
ENDLESS: Json = {"tuner": {"total_iters": 10_000}}
NEVER_SURE: Json = {"objective": "next_eps", "tolerance": 1e-6}  # The number of iterations is known then.
STEP_BY_STEP: Json = {
    "tuner": {**NEVER_SURE, "tune_type": "sequential", "total_iters": 100, "population_size": 64},
    "evaluation": SMALLEST,
}
SPREAD: Json = {"tuner": {**NEVER_SURE, "total_iters": 150}, "evaluation": SMALLEST}

# Python loads this first, so that our code, and most of others' code, gets another time when it asks.
WRONG_CLOCK = """
import os
import time
from datetime import timedelta

from service.registry import types

right_time, right_now, off_by = time.time, types.utc_now, float(os.environ["CLOCK_OFF_BY"])
time.time = lambda: right_time() + off_by
types.utc_now = lambda: right_now() + timedelta(seconds=off_by)
"""


@pytest.fixture
def ring(fragile: Stack) -> str:
    return fragile.register("mixture-ring")


@pytest.mark.parametrize("effort", [STEADY, STEP_BY_STEP], ids=["end to end, Adam", "step by step, Gauss-Newton"])
def test_a_job_whose_worker_is_killed_ends_with_the_schedule_of_an_undisturbed_run(
    fragile: Stack, gratings: str, undisturbed: Undisturbed, effort: Json
) -> None:
    expected = undisturbed(gratings, num_steps=4, seed=5, **effort)
    job = fragile.submit(gratings, num_steps=4, seed=5, **effort)
    fragile.running(job)
    fragile.end("worker", number=signal.SIGKILL)
    interrupted = fragile.client.get(f"/v1/tuning-jobs/{job['id']}").json()
    assert 0 < interrupted["progress"] < 0.8
    status, readiness = fragile.readiness()
    assert (status, readiness["broker"], readiness["workers"]) == (503, "ok", "none for sampling, tuning")

    fragile.start("worker")
    done = fragile.finished(job)
    assert (done["state"], done["progress"], done["error"]) == ("succeeded", 1.0, None)
    assert done["attempt"] > 1
    assert fragile.readiness()[0] == 200
    listed = fragile.client.get("/v1/schedules", params={"model": gratings, "num_steps": 4}).json()["items"]
    schedules = [schedule for schedule in listed if schedule["job"] == job["id"]]
    assert [schedule["id"] for schedule in schedules] == [done["schedule"]]
    assert schedules[0]["t_ratios"] == expected["t_ratios"]
    assert schedules[0]["version"] == 1 + max(s["version"] for s in listed if s["job"] != job["id"])
    for name in ("teacher_l2_before", "teacher_l2_after", "frechet_after"):
        assert schedules[0]["evaluation"][name] == expected["evaluation"][name]


def workers_at_work(stack: Stack, job: Json) -> dict[str, TuningTask]:
    """The name of each worker that runs a task of a job, and the task."""
    names = {process.pid: name for name, process in stack.processes.items()}
    with stack.registry.read() as session:
        query = select(TuningTask).where(TuningTask.job_id == job["id"], TuningTask.state == JobState.RUNNING)
        tasks = session.scalars(query).all()
    return {names[int(str(task.lease_owner).rpartition(":")[2])]: task for task in tasks}


def test_steps_spread_over_three_workers_of_which_two_are_killed_end_as_on_one(
    fragile: Stack, gratings: str, undisturbed: Undisturbed
) -> None:
    total_iters = 800
    tuner = {**SPREAD["tuner"], "total_iters": total_iters}
    request = {"num_steps": 5, "seed": 5, **SPREAD, "tuner": tuner}
    alone = undisturbed(gratings, **request)
    calls_per_iteration = 4 * 16 * 5  # four steps, 16 samples, one call for the target and two on either side
    assert alone["evaluation"]["network_calls"] == total_iters * calls_per_iteration

    fragile.start("worker 2", "worker 3")
    fragile.wait_for_workers(3)
    first = [fragile.submit(gratings, num_steps=3, **ENDLESS) for _ in range(3)]
    for each in first:  # All workers have imported PyTorch then, so none of them begins after a task has ended.
        fragile.running(each)
    for each in first:
        fragile.client.post(f"/v1/tuning-jobs/{each['id']}/cancel")
        fragile.finished(each)
    job = fragile.submit(gratings, **request)
    tasks = wait_until(lambda: len(found := workers_at_work(fragile, job)) == 3 and found, "work of three workers")
    with fragile.registry.read() as session:
        owner = session.get_one(TuningJob, job["id"]).lease_owner
    killed = sorted(tasks, key=lambda name: tasks[name].lease_owner != owner)[:2]  # the job's own, and a helper
    fragile.end(*killed, number=signal.SIGKILL)
    done = fragile.finished(job)
    assert (done["state"], done["error"], done["attempt"]) == ("succeeded", None, 2)
    schedule = fragile.client.get(f"/v1/schedules/{done['schedule']}").json()
    assert schedule["t_ratios"] == alone["t_ratios"]
    assert schedule["evaluation"]["teacher_l2_after"] == alone["evaluation"]["teacher_l2_after"]
    with fragile.registry.read() as session:
        assert all(session.get_one(TuningTask, tasks[name].id).attempt == 2 for name in killed)


def test_a_job_the_broker_forgot_still_runs(fragile: Stack, ring: str) -> None:
    busy = fragile.submit(ring, num_steps=4, **ENDLESS)
    fragile.running(busy)
    queued = fragile.submit(ring, num_steps=3, **QUICK)
    fragile.end("broker", number=signal.SIGKILL)
    fragile.start("broker")  # empty: it keeps nothing on disk
    fragile.client.post(f"/v1/tuning-jobs/{busy['id']}/cancel")
    assert fragile.finished(busy)["state"] == "cancelled"
    done = fragile.finished(queued)
    assert (done["state"], done["attempt"]) == ("succeeded", 1)
    # The API says so at once, though its connections are older than the broker.
    assert fragile.readiness()[1]["broker"] == "ok"


def test_jobs_submitted_while_broker_and_dispatcher_are_away_run_once_they_are_back(fragile: Stack, ring: str) -> None:
    fragile.end("dispatcher", "broker")
    tuning = fragile.submit(ring, num_steps=3, **QUICK)
    answer = fragile.client.post(
        "/v1/samples", json={"model": ring, "num_steps": 3}, headers={"Prefer": "respond-async"}
    )
    assert answer.status_code == 202
    status, readiness = fragile.readiness()
    assert (status, readiness["database"]) == (503, "ok")
    assert readiness["broker"].startswith("unreachable")
    assert fragile.client.get("/healthz").status_code == 200

    fragile.start("broker", "dispatcher")
    assert fragile.finished(tuning)["state"] == "succeeded"
    assert fragile.finished(answer.json(), "samples")["state"] == "succeeded"
    fragile.wait_until_ready()


def test_a_job_submitted_without_a_dispatcher_runs_at_once(fragile: Stack, ring: str) -> None:
    fragile.end("dispatcher")
    assert fragile.finished(fragile.submit(ring, num_steps=3, **QUICK))["attempt"] == 1
    fragile.start("dispatcher")


def test_processes_with_a_wrong_clock_lose_nothing_and_take_nothing_from_others(
    fragile: Stack, gratings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG_CLOCK)
    packages = fragile.environment["PYTHONPATH"]
    monkeypatch.setattr(fragile, "forks", False)
    monkeypatch.setitem(fragile.environment, "PYTHONPATH", os.pathsep.join([str(tmp_path), packages]))
    fragile.end("dispatcher")
    for name, off_by in (("dispatcher", -3600), ("worker 2", 3600)):
        monkeypatch.setitem(fragile.environment, "CLOCK_OFF_BY", str(off_by))
        fragile.start(name)
    fragile.wait_for_workers(2)
    # Neither job ends before the other worker, which is no fork, has imported PyTorch.
    long = STEADY | {"tuner": STEADY["tuner"] | {"total_iters": 240}}
    jobs = [fragile.submit(gratings, num_steps=4, seed=seed, **long) for seed in (5, 6)]
    started = [datetime.fromisoformat(fragile.running(job)["started_at"]) for job in jobs]  # one by each worker
    assert abs(started[1] - started[0]) > timedelta(minutes=50)
    fragile.end("worker 2", number=signal.SIGKILL)
    done = [fragile.finished(job) for job in jobs]
    fragile.end("dispatcher")
    assert [job["state"] for job in done] == ["succeeded", "succeeded"]
    assert sorted(job["attempt"] for job in done) == [1, 2]
