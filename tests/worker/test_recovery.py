"""No accepted job is lost and none is applied twice, whatever part of a deployment dies."""

import signal

import pytest

from tests.stack import Json, Stack

QUICK: Json = {"tuner": {"total_iters": 2, "population_size": 16}, "evaluation": {"num_samples": 16}}
# Long enough to be killed in the middle, many saves after its start and many before its end.
STEADY: Json = {
    "tuner": {"total_iters": 250, "population_size": 32, "teacher_num_steps": 10},
    "evaluation": {"num_samples": 32},
}
ENDLESS: Json = {"tuner": {"total_iters": 10_000}}


@pytest.fixture(scope="module")
def ring(fragile: Stack) -> str:
    return fragile.register("mixture-ring")


def test_a_job_whose_worker_is_killed_ends_with_the_schedule_of_an_undisturbed_run(fragile: Stack, ring: str) -> None:
    undisturbed = fragile.tune(ring, num_steps=4, seed=5, **STEADY)
    job = fragile.submit(ring, num_steps=4, seed=5, **STEADY)
    fragile.running(job)
    fragile.end("worker", number=signal.SIGKILL)
    interrupted = fragile.client.get(f"/v1/tuning-jobs/{job['id']}").json()
    assert 0 < interrupted["progress"] < 0.8
    status, readiness = fragile.readiness()
    assert (status, readiness["broker"], readiness["workers"]) == (503, "ok", "none for tuning, sampling")

    fragile.start("worker")
    done = fragile.finished(job)
    assert (done["state"], done["progress"], done["error"]) == ("succeeded", 1.0, None)
    assert done["attempt"] > 1
    assert fragile.readiness()[0] == 200
    listed = fragile.client.get("/v1/schedules", params={"model": ring, "num_steps": 4}).json()["items"]
    schedules = [schedule for schedule in listed if schedule["job"] == job["id"]]
    assert [schedule["id"] for schedule in schedules] == [done["schedule"]]
    assert schedules[0]["t_ratios"] == undisturbed["t_ratios"]
    assert schedules[0]["version"] == undisturbed["version"] + 1
    for name in ("teacher_l2_before", "teacher_l2_after", "frechet_after"):
        assert schedules[0]["evaluation"][name] == undisturbed["evaluation"][name]


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
