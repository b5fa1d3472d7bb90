"""Submitting, following and cancelling tuning jobs over HTTP."""

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from service.shared.job_requests import TuningJobRequest
from tests.service.problems import assert_problem
from tests.stack import ENOUGH, QUICK, SMALLEST, Json, Stack
from timetuner_core.tuners import MAX_CALLS_OF_DEFAULT_SOLVER

SMALL: Json = {"population_size": 16, "teacher_num_steps": 20}
LONG: Json = {"tuner": {"total_iters": 10_000, **SMALL}, "evaluation": SMALLEST}
LONG_TASKS: Json = {
    "tuner": {"objective": "next_eps", "optimizer": "adam", "total_iters": 10_000, "population_size": 16},
    "evaluation": SMALLEST,
}


@pytest.fixture
def ring(stack: Stack) -> str:
    return stack.register("mixture-ring")


def events(stack: Stack, job: Json, after: int = 0) -> list[Json]:
    items: list[Json] = stack.client.get(f"/v1/tuning-jobs/{job['id']}/events", params={"after": after}).json()["items"]
    return items


GAUSS_NEWTON = range(1, 65)  # it stops when it is sure enough


@pytest.mark.parametrize(
    ("tuner", "iterations"),
    [
        ({"objective": "end_to_end", "total_iters": 5, **SMALL}, [5]),
        ({"objective": "end_to_end", "parameters": "both", "total_iters": 4, **SMALL}, [4]),
        ({"objective": "solver", "total_iters": 2, "population_size": 64}, range(1, 3)),
        ({"objective": "next_eps", "optimizer": "adam", "total_iters": 5}, [5]),
        ({"objective": "next_eps", "tune_type": "sequential", "data": "generated"}, GAUSS_NEWTON),
        ({"objective": "teacher_step", "spread": False, "tolerance": 0.05}, GAUSS_NEWTON),
        ({"objective": "ays", "num_samples": 32}, [0]),
        ({"objective": "gits", "population_size": 32}, [0]),
        ({"objective": "dc_solver", "population_size": 4, "teacher_num_steps": 20}, [0]),
        ({"objective": "dmn"}, [0]),
        ({"objective": "grid"}, [0]),
    ],
)
def test_a_job_makes_one_evaluated_schedule_that_says_how_it_was_made(
    stack: Stack, ring: str, tuner: Json, iterations: Collection[int]
) -> None:
    job = stack.submit(ring, num_steps=4, seed=3, timesteps="log_snr", tuner=tuner, evaluation=SMALLEST)
    done = stack.finished(job)
    assert (done["state"], done["progress"], done["error"]) == ("succeeded", 1.0, None)
    assert all(step["done"] for step in done["steps"])
    assert all(step["iterations"] in iterations for step in done["steps"][:3])

    schedule = stack.client.get(f"/v1/schedules/{done['schedule']}").json()
    assert schedule["job"] == job["id"]
    assert schedule["t_ratios"] == [step["t_ratio"] for step in done["steps"]]
    assert schedule["timesteps"] == done["timesteps"]
    assert len(schedule["timesteps"]) == 5
    assert schedule["provenance"]["seed"] == 3
    assert schedule["provenance"]["tuner"]["objective"] == tuner["objective"]
    assert (schedule["solver_table"] is None) == (tuner["objective"] not in {"solver", "dc_solver"})


@pytest.mark.parametrize(
    ("setting", "objective"),
    [
        ({}, "solver"),
        ({"sampler": "dpmpp_3m", "num_steps": MAX_CALLS_OF_DEFAULT_SOLVER}, "solver"),
        ({"num_steps": MAX_CALLS_OF_DEFAULT_SOLVER + 1}, "end_to_end"),
        ({"sampler": "heun", "num_steps": MAX_CALLS_OF_DEFAULT_SOLVER // 2}, "solver"),
        ({"sampler": "heun", "num_steps": MAX_CALLS_OF_DEFAULT_SOLVER // 2 + 1}, "end_to_end"),
        ({"sampler": "ddpm"}, "end_to_end"),
        ({"eta": 1}, "end_to_end"),
        ({"tuner": {}}, "end_to_end"),
        ({"tuner": {"total_iters": 40}}, "end_to_end"),
    ],
)
def test_a_request_without_a_tuner_learns_the_solver_where_that_applies(setting: Json, objective: str) -> None:
    request = TuningJobRequest.model_validate({"model": "mdl_1", "num_steps": 5, **setting})
    assert request.tuner.objective == objective
    assert TuningJobRequest.stored(request.model_dump(mode="json")) == request


def test_a_default_job_makes_a_learned_solver_that_auto_samples_with(stack: Stack, ring: str) -> None:
    schedule = stack.tune(ring, num_steps=3, evaluation=ENOUGH["evaluation"])
    assert (schedule["provenance"]["tuner"]["objective"], schedule["status"]) == ("solver", "accepted")
    assert len(schedule["solver_table"]["a"]) == 3
    found = stack.client.get("/v1/schedules/resolve", params={"model": ring, "num_steps": 3}).json()["schedule"]
    assert found["id"] == schedule["id"]


@pytest.mark.parametrize(("chosen", "objective"), [("", "solver"), ("end_to_end", "end_to_end")])
def test_the_pages_form_leaves_the_choice_of_a_tuner_to_the_service(
    stack: Stack, ring: str, chosen: str, objective: str
) -> None:
    form = {"model": ring, "num_steps": "2", "objective": chosen}
    answer = stack.client.post("/jobs", data=form, headers={"Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 303, answer.text
    url = f"/v1{answer.headers['Location']}".replace("/jobs/", "/tuning-jobs/")
    assert stack.client.get(url).json()["request"]["tuner"]["objective"] == objective
    stack.client.post(f"{url}/cancel")


@pytest.mark.parametrize("eta", [0, 1])
def test_an_evaluation_gives_all_metrics_with_their_intervals_and_says_what_decided(
    stack: Stack, ring: str, eta: float
) -> None:
    tuner = {"objective": "next_eps", "optimizer": "adam", "total_iters": 10}
    schedule = stack.tune(ring, num_steps=4, eta=eta, tuner=tuner, evaluation=ENOUGH["evaluation"])
    evaluation = schedule["evaluation"]
    assert evaluation["num_samples"] == 64
    assert evaluation["network_calls"] >= tuner["total_iters"] * 16
    metrics = evaluation["metrics"]
    assert {"teacher_l2", "frechet", "sliced_wasserstein", "wasserstein"} <= set(metrics)
    for name in ("teacher_l2", "frechet"):
        figures = evaluation[f"{name}_before"], evaluation[f"{name}_after"]
        assert (metrics[name]["before"], metrics[name]["after"]) == figures
    for metric in metrics.values():
        assert metric["change"] == pytest.approx(metric["after"] - metric["before"])
        assert metric["low"] <= metric["high"]
    decides = metrics["frechet" if eta else "teacher_l2"]
    assert schedule["score"] == pytest.approx(decides["after"] / decides["before"])
    # Noise makes each sample another one than the teacher's, so there its distance does not count.
    counts = [metric for name, metric in metrics.items() if name != "teacher_l2" or not eta]
    better = decides["high"] < 0 and metrics["frechet"]["change"] <= 0 and all(metric["low"] <= 0 for metric in counts)
    best = evaluation["best_untuned"]
    assert schedule["status"] == ("accepted" if better and (best is None or best["high"] < 0) else "rejected")
    assert any(name in evaluation["reason"] for name in (*metrics, "than untuned ddim on the grid"))
    if eta:
        assert evaluation["worth"] is best is None
    else:
        assert best["change"] == pytest.approx(evaluation["teacher_l2_after"] - best["teacher_l2"])
        assert best["grid"] == evaluation["worth"]["grid"]
        worth = evaluation["worth"]
        assert [each["num_steps"] for each in worth["untuned"]] == [4, 6, 8, 12, 16]
        assert worth["num_samples"] == 64
        assert worth["teacher_l2"] == pytest.approx(evaluation["teacher_l2_after"])
        assert worth["untuned"][0]["teacher_l2"] <= evaluation["teacher_l2_before"] * 1.0001


@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_type": "classifier", "guidance_scale": 1.5},
        {"guidance_type": "classifier-free", "guidance_scale": 2},
    ],
)
def test_tuning_end_to_end_brings_guided_samples_closer_to_the_teachers(
    stack: Stack, ring: str, guidance: Json
) -> None:
    schedule = stack.tune(ring, num_steps=5, **ENOUGH, **guidance)
    assert schedule["status"] == "accepted"
    assert schedule["evaluation"]["teacher_l2_after"] < schedule["evaluation"]["teacher_l2_before"]


def test_the_same_request_gives_the_same_ratios_in_a_new_version(stack: Stack, ring: str) -> None:
    first, second = (stack.tune(ring, num_steps=6, **QUICK) for _ in range(2))
    assert first["t_ratios"] == second["t_ratios"]
    assert first["evaluation"]["teacher_l2_after"] == second["evaluation"]["teacher_l2_after"]
    assert second["version"] == first["version"] + 1
    other = stack.tune(ring, num_steps=6, seed=1, **QUICK)
    assert other["t_ratios"] != first["t_ratios"]


@pytest.mark.both_engines
def test_events_tell_the_whole_story_and_a_stream_resumes_where_it_broke(stack: Stack, ring: str) -> None:
    job = stack.submit(ring, num_steps=3, **QUICK)
    url = f"/v1/tuning-jobs/{job['id']}/events"
    with stack.client.stream("GET", url, headers={"Accept": "text/event-stream"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    streamed = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    types = [event["type"] for event in streamed]
    assert types[:2] == ["queued", "started"]
    assert types[-2:] == ["evaluated", "succeeded"]
    assert "progress" in types
    assert streamed == events(stack, job)

    seen = streamed[1]["id"]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(seen)}
    resumed = stack.client.get(url, headers=headers).text
    assert f"id: {seen}\r\n" not in resumed
    assert [f"id: {event['id']}" for event in streamed[2:]] == [
        line for line in resumed.splitlines() if line.startswith("id: ")
    ]
    assert events(stack, job, after=seen) == streamed[2:]


@pytest.mark.parametrize("effort", [LONG, LONG_TASKS], ids=["as a whole", "in tasks"])
def test_cancelling_stops_a_running_job_without_a_schedule(stack: Stack, ring: str, effort: Json) -> None:
    job = stack.submit(ring, num_steps=4, **effort)
    stack.running(job)
    assert stack.client.post(f"/v1/tuning-jobs/{job['id']}/cancel").json()["cancel_requested"]
    done = stack.finished(job)
    assert (done["state"], done["schedule"]) == ("cancelled", None)
    assert stack.client.post(f"/v1/tuning-jobs/{job['id']}/cancel").json()["state"] == "cancelled"  # again: no harm


def test_a_job_fails_with_the_error_of_the_step_that_cannot_be_tuned(stack: Stack, ring: str) -> None:
    job = stack.finished(stack.submit(ring, num_steps=4, sampler="own_untunable", tuner={"objective": "next_eps"}))
    assert (job["state"], job["schedule"]) == ("failed", None)
    assert "step 0: ArithmeticError: this sampler cannot be tuned" in job["error"]


def test_a_job_whose_teacher_is_not_fit_to_judge_by_fails_and_says_why(stack: Stack, ring: str) -> None:
    """Two steps of a sampler of second order, and its half, one step, have little to do with each other."""
    evaluation = {"num_samples": 32, "teacher_num_steps": 2}
    job = stack.finished(stack.submit(ring, num_steps=1, sampler="heun", evaluation=evaluation))
    assert (job["state"], job["schedule"]) == ("failed", None)
    assert "the teacher of 2 steps fails its check, as " in job["error"]
    assert "accepted: up to" in job["error"]


def test_a_queued_job_is_cancelled_at_once_and_never_starts(stack: Stack, ring: str) -> None:
    busy = stack.submit(ring, num_steps=4, **LONG)
    stack.running(busy)
    queued = stack.submit(ring, num_steps=3, **QUICK)
    assert stack.client.post(f"/v1/tuning-jobs/{queued['id']}/cancel").json()["state"] == "cancelled"
    stack.client.post(f"/v1/tuning-jobs/{busy['id']}/cancel")
    stack.finished(busy)
    stack.finished(stack.submit(ring, num_steps=3, **QUICK))  # the worker has gone past the cancelled one
    assert [event["type"] for event in events(stack, queued)] == ["queued", "cancelled"]


def test_a_finished_job_is_not_cancelled(stack: Stack, ring: str) -> None:
    job = stack.finished(stack.submit(ring, num_steps=3, **QUICK))
    assert_problem(stack.client.post(f"/v1/tuning-jobs/{job['id']}/cancel"), 409, accepted="queued or running")
    assert stack.client.get(f"/v1/tuning-jobs/{job['id']}").json() == job


def test_an_idempotency_key_makes_one_job_however_often_it_is_sent(stack: Stack, ring: str) -> None:
    body = {"model": ring, "num_steps": 3, **QUICK}
    headers = {"Idempotency-Key": f"key-{ring}"}

    def post(body: Json) -> httpx.Response:
        return stack.client.post("/v1/tuning-jobs", json=body, headers=headers)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(post, [body] * 8))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert_problem(post({**body, "num_steps": 4}), 409, "Idempotency-Key")
    stack.finished(answers[0].json())


@pytest.mark.both_engines
def test_jobs_are_listed_newest_first_and_by_state(stack: Stack, ring: str) -> None:
    jobs = [stack.finished(stack.submit(ring, num_steps=3, **QUICK)) for _ in range(2)]
    listed = stack.client.get("/v1/tuning-jobs", params={"limit": 2}).json()
    assert [job["id"] for job in listed["items"]] == [jobs[1]["id"], jobs[0]["id"]]
    states = stack.client.get("/v1/tuning-jobs", params={"state": "cancelled"}).json()["items"]
    assert all(job["state"] == "cancelled" for job in states)


BAD_REQUESTS: dict[str, tuple[Json, str, str]] = {
    "an unknown model": ({"model": "mdl_nope"}, "model", "registered model"),
    "no model": ({"model": None}, "model", ""),
    "no steps": ({"num_steps": 0}, "num_steps", "greater than or equal to 1"),
    "negative steps": ({"num_steps": -3}, "num_steps", ""),
    "half a step": ({"num_steps": 2.5}, "num_steps", ""),
    "more steps than it was trained on": ({"num_steps": 1001}, "num_steps", "1 to 1000"),
    "negative guidance": (
        {"guidance_type": "classifier-free", "guidance_scale": -1},
        "guidance_scale",
        "greater than or equal to 0",
    ),
    "NaN guidance": ({"guidance_type": "classifier-free", "guidance_scale": "NaN"}, "guidance_scale", ""),
    "endless decimals": ({"guidance_type": "classifier-free", "guidance_scale": 0.1234567}, "guidance_scale", "6"),
    "a scale without guidance": ({"guidance_scale": 2}, "guidance_scale", "1 when"),
    "guidance it cannot have": ({"guidance_type": "classifier"}, "guidance_type", "uncond, classifier-free"),
    "an unknown guidance": ({"guidance_type": "magic"}, "guidance_type", "'classifier-free'"),
    "an unknown sampler": ({"sampler": "magic"}, "sampler", "ddim"),
    "eta too high": ({"eta": 1.5}, "eta", "less than or equal to 1"),
    "eta that has no end result": ({"eta": 0.5}, "eta", "next_eps"),
    "an unknown objective": ({"tuner": {"objective": "magic"}}, "tuner", "end_to_end"),
    "an option of another objective": ({"tuner": {"tune_type": "parallel"}}, "tune_type", ""),
    "an option of another optimizer": ({"tuner": {"objective": "next_eps", "lr": 0.1}}, "lr", "'adam'"),
    "a tolerance that Adam has no use for": (
        {"tuner": {"objective": "teacher_step", "optimizer": "adam", "tolerance": 0.1}},
        "tolerance",
        "'gauss_newton'",
    ),
    "a solver of a sampler that adds noise": (
        {"tuner": {"objective": "solver"}, "sampler": "ddpm"},
        "sampler",
        "'next_eps'",
    ),
    "one step's result, with noise": ({"tuner": {"objective": "teacher_step"}, "sampler": "ddpm"}, "sampler", "'ays'"),
    "steps that need those before, all at once": (
        {"tuner": {"objective": "teacher_step"}, "sampler": "dpmpp_2m"},
        "tune_type",
        "'sequential'",
    ),
    "fewer times to choose from than steps": (
        {"tuner": {"objective": "gits", "num_candidates": 5}},
        "num_candidates",
        "more than num_steps",
    ),
    "a start of its choice, where one is given": (
        {"timesteps": "log_snr", "tuner": {"start": "best"}},
        "start",
        "'given'",
    ),
    "no iterations": ({"tuner": {"total_iters": 0}}, "total_iters", ""),
    "a teacher that is no better": ({"tuner": {"teacher_num_steps": 5}}, "teacher_num_steps", "more than num_steps"),
    "a negative seed": ({"seed": -1}, "seed", ""),
    "a misspelt option": ({"num_step": 5}, "num_step", ""),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_makes_no_job(stack: Stack, name: str) -> None:
    change, field, accepted = BAD_REQUESTS[name]
    newest = stack.client.get("/v1/tuning-jobs", params={"limit": 1}).json()
    body: dict[str, Any] = {"model": stack.register("digits8"), "num_steps": 5, **change}
    assert_problem(stack.client.post("/v1/tuning-jobs", json=body), 422, field, accepted)
    assert stack.client.get("/v1/tuning-jobs", params={"limit": 1}).json() == newest


@pytest.mark.parametrize("path", ["", "/cancel", "/events"])
def test_an_unknown_job_is_not_found(client: httpx.Client, path: str) -> None:
    method = "POST" if path == "/cancel" else "GET"
    assert_problem(client.request(method, f"/v1/tuning-jobs/job_nope{path}"), 404)
    if path == "/events":
        accept = {"Accept": "text/event-stream"}
        assert_problem(client.get("/v1/tuning-jobs/job_nope/events", headers=accept), 404)
