"""The registry's queries over HTTP: filters, the best schedule for a request, aliases, import and deletion."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch

from service.schedules.evaluations import EvaluationOut
from tests.service.problems import assert_problem
from tests.stack import ENOUGH, Json, Stack
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import get_sampler
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.sampling.generate import Guidance, generate

# Few iterations of Adam are not nearer to the teacher than the best named grid, beyond chance; one of the solver's is.
GOOD: Json = {
    "tuner": {"objective": "solver", "total_iters": 1, "population_size": 48, "teacher_num_steps": 20},
    "evaluation": ENOUGH["evaluation"],
}
# One iteration at this rate throws every ratio to its bound: far worse than untuned.
BAD: Json = {
    "tuner": {"total_iters": 1, "lr": 1.0, "population_size": 16, "teacher_num_steps": 20},
    "evaluation": ENOUGH["evaluation"],
}


@pytest.fixture(scope="module")
def model(stack: Stack) -> str:
    return stack.register("mixture-gratings")


@pytest.fixture(scope="module")
def good(stack: Stack, model: str) -> Iterator[Json]:
    yield stack.tune(model, num_steps=4, **GOOD)


@pytest.fixture(scope="module")
def bad(stack: Stack, model: str, good: Json) -> Iterator[Json]:
    """A schedule worse than untuned, at the same setting as the good one."""
    yield stack.tune(model, num_steps=4, **BAD)


def resolve(client: httpx.Client, model: str, **query: object) -> Json:
    response = client.get("/v1/schedules/resolve", params={"model": model, **query})
    assert response.status_code == 200, response.text
    resolution: Json = response.json()
    return resolution


def test_a_schedule_worse_than_untuned_is_rejected_with_its_figures(good: Json, bad: Json) -> None:
    assert (good["status"], bad["status"]) == ("accepted", "rejected")
    assert good["score"] < 1 < bad["score"]
    assert bad["evaluation"]["teacher_l2_after"] > bad["evaluation"]["teacher_l2_before"]
    assert bad["evaluation"]["teacher_l2_before"] == good["evaluation"]["teacher_l2_before"]


@pytest.mark.both_engines
def test_resolve_gives_the_best_accepted_schedule_of_exactly_this_setting(
    client: httpx.Client, model: str, good: Json, bad: Json
) -> None:
    resolution = resolve(client, model, num_steps=4)
    assert resolution["schedule"] == good
    assert f"version {good['version']}" in resolution["reason"]
    for other in ({"num_steps": 5}, {"num_steps": 4, "eta": 0.5}, {"num_steps": 4, "guidance_type": "classifier-free"}):
        assert resolve(client, model, **other)["schedule"] is None


def test_where_all_are_rejected_auto_falls_back_to_untuned(stack: Stack, model: str) -> None:
    rejected = stack.tune(model, num_steps=7, **BAD)
    assert rejected["status"] == "rejected"
    resolution = resolve(stack.client, model, num_steps=7)
    assert resolution["schedule"] is None
    assert "1 rejected" in resolution["reason"]

    body = {"model": model, "num_steps": 7, "num_images": 2}
    answers = {
        name: stack.client.post("/v1/samples", json={**body, "schedule": name}, headers={"Accept": "application/x-npy"})
        for name in ("auto", "none", rejected["id"])
    }
    assert answers["auto"].headers["timetuner-schedule"] == "none"
    assert answers["auto"].content == answers["none"].content
    assert answers[rejected["id"]].headers["timetuner-schedule"] == rejected["id"]
    assert answers[rejected["id"]].content != answers["none"].content


def test_auto_samples_with_the_accepted_schedule(stack: Stack, model: str, good: Json, bad: Json) -> None:
    body = {"model": model, "num_steps": 4, "num_images": 2}
    headers = {"Accept": "application/x-npy"}
    auto = stack.client.post("/v1/samples", json=body, headers=headers)
    by_id = stack.client.post("/v1/samples", json={**body, "schedule": good["id"]}, headers=headers)
    untuned = stack.client.post("/v1/samples", json={**body, "schedule": "none"}, headers=headers)
    assert auto.headers["timetuner-schedule"] == good["id"]
    assert np.array_equal(auto.content, by_id.content)
    assert auto.content != untuned.content


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, {"good", "bad"}),
        ({"status": "accepted"}, {"good"}),
        ({"status": "rejected"}, {"bad"}),
        ({"num_steps": 4, "guidance_type": "uncond", "guidance_scale": 1, "eta": 0}, {"good", "bad"}),
        ({"num_steps": 99}, set()),
        ({"guidance_scale": 2}, set()),
        ({"eta": 0.5}, set()),
    ],
)
def test_schedules_are_found_by_any_part_of_their_key(
    client: httpx.Client, model: str, good: Json, bad: Json, filters: Json, expected: set[str]
) -> None:
    listed = client.get("/v1/schedules", params={"model": model, "limit": 200, **filters}).json()["items"]
    ids = {item["id"] for item in listed}
    assert {name for name, schedule in (("good", good), ("bad", bad)) if schedule["id"] in ids} == expected


def test_an_alias_samples_its_schedule_and_can_be_moved(stack: Stack, model: str, good: Json, bad: Json) -> None:
    url = f"/v1/models/{model}/aliases/production"
    body = {"model": model, "num_steps": 4, "schedule": "production"}
    for schedule in (good, bad):
        answer = stack.client.put(url, json={"schedule": schedule["id"]})
        assert answer.json() == {"model": model, "name": "production", "schedule": schedule["id"]}
        assert stack.client.post("/v1/samples", json=body).headers["timetuner-schedule"] == schedule["id"]


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/v1/models/{model}/aliases/auto", {"schedule": "{good}"}, 422, "name"),
        ("/v1/models/{model}/aliases/NO", {"schedule": "{good}"}, 422, "name"),
        ("/v1/models/{model}/aliases/a", {"schedule": "sch_nope"}, 422, "schedule"),
        ("/v1/models/{ring}/aliases/a", {"schedule": "{good}"}, 422, "schedule"),
        ("/v1/models/mdl_nope/aliases/a", {"schedule": "{good}"}, 404, None),
    ],
)
def test_a_bad_alias_is_refused(
    stack: Stack, model: str, good: Json, path: str, body: Json, status: int, field: str | None
) -> None:
    names = {"model": model, "good": good["id"], "ring": stack.register("mixture-ring")}
    body = {"schedule": body["schedule"].format(**names)}
    assert_problem(stack.client.put(path.format(**names), json=body), status, field)


@pytest.mark.parametrize(
    ("path", "query", "status", "field"),
    [
        ("", {"num_steps": 0}, 422, "num_steps"),
        ("", {"status": "fine"}, 422, "status"),
        ("", {"order": "score"}, 422, "order"),
        ("", {"sort": "size"}, 422, "sort"),
        ("/resolve", {"num_steps": 4}, 422, "model"),
        ("/resolve", {"model": "mdl_nope", "num_steps": 4}, 422, "model"),
        ("/resolve", {"model": "mdl_nope", "num_steps": 4, "guidance_scale": -1}, 422, "guidance_scale"),
        ("/sch_nope", {}, 404, None),
    ],
)
def test_a_bad_query_is_refused(client: httpx.Client, path: str, query: Json, status: int, field: str | None) -> None:
    assert_problem(client.get(f"/v1/schedules{path}", params=query), status, field)


def exported(schedule: Json, **changes: object) -> Json:
    """The part of a schedule that its owner takes along to another registry."""
    not_taken = {"id", "owner", "job", "version", "status", "score", "evaluation", "created_at"}
    return {**{name: value for name, value in schedule.items() if name not in not_taken}, **changes}


def test_an_imported_schedule_samples_as_the_one_exported_but_auto_never_picks_it(
    stack: Stack, model: str, good: Json
) -> None:
    response = stack.client.post("/v1/schedules", json=exported(good))
    assert response.status_code == 201, response.text
    imported = response.json()
    assert (imported["status"], imported["score"], imported["evaluation"]) == ("imported", None, None)
    assert exported(imported) == exported(good)
    assert imported["version"] > good["version"]
    assert stack.client.get(response.headers["location"]).json() == imported
    assert imported in stack.client.get("/v1/schedules", params={"status": "imported"}).json()["items"]
    assert resolve(stack.client, model, num_steps=4)["schedule"] == good

    stack.client.put(f"/v1/models/{model}/aliases/mine", json={"schedule": imported["id"]})
    body = {"model": model, "num_steps": 4}
    answers = [
        stack.client.post("/v1/samples", json={**body, "schedule": name}, headers={"Accept": "application/x-npy"})
        for name in (good["id"], imported["id"], "mine")
    ]
    assert [answer.headers["timetuner-schedule"] for answer in answers] == [good["id"]] + 2 * [imported["id"]]
    assert len({answer.content for answer in answers}) == 1


def sampled(stack: Stack, setting: Json, schedule: str) -> bytes:
    body = {**setting, "schedule": schedule, "num_images": 3, "seed": 11}
    answer = stack.client.post("/v1/samples", json=body, headers={"Accept": "application/x-npy"})
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_a_learned_solver_is_accepted_sampled_with_and_imported(stack: Stack, model: str, sampler: str) -> None:
    """A solver of Heun's has two rows per step, and the times of its calls."""
    setting: Json = {"model": model, "num_steps": 4, "sampler": sampler}
    tuner = {"objective": "solver", "population_size": 64, "total_iters": 3}
    schedule = stack.tune(**setting, tuner=tuner, evaluation=ENOUGH["evaluation"])
    assert schedule["status"] == "accepted"
    table = SolverTable.from_dict(schedule["solver_table"])
    assert table.num_calls == get_sampler(sampler).network_calls(torch.tensor(schedule["timesteps"]))
    assert (table.times is None) == (sampler == "dpmpp_2m")

    without = stack.client.post("/v1/schedules", json=exported(schedule, solver_table=None)).json()
    imported = stack.client.post("/v1/schedules", json=exported(schedule)).json()
    assert imported["solver_table"] == schedule["solver_table"]
    with ThreadPoolExecutor(4) as pool:  # Side by side, they must not share a batch.
        by_id, by_import, by_auto, by_own = pool.map(
            lambda name: sampled(stack, setting, name), (schedule["id"], imported["id"], "auto", without["id"])
        )
    assert by_id == by_import == by_auto != by_own

    grid, t_ratios = torch.tensor(schedule["timesteps"]).double(), schedule["t_ratios"]
    loaded, guidance = load_builtin("mixture-gratings"), Guidance("uncond", 1.0)
    expected = generate(loaded, guidance, [11, 12, 13], None, grid, t_ratios, sampler=table.sampler(sampler))
    np.testing.assert_allclose(np.load(io.BytesIO(by_id)), expected.numpy(), atol=1e-4)


TWO_ROWS: Json = {"a": [0.5, 0.0], "b": [[0.5], [0.1, 0.9]]}
FOUR_ROWS: Json = {"a": [0.5] * 4, "b": [[0.5] * (i + 1) for i in range(4)]}
# Four steps of Heun's to time 0 call the network seven times.
TO_0: Json = {"sampler": "heun", "timesteps": [1, 0.7, 0.5, 0.2, 0], "t_ratios": [1] * 4}
ROWS_OF_HEUN: Json = {"a": [0.5] * 7, "b": [[0.5] * (i + 1) for i in range(7)]}

BAD_IMPORTS: dict[str, tuple[Json, str, str]] = {
    "an unknown model": ({"model": "mdl_nope"}, "model", "registered model"),
    "no steps": ({"num_steps": 0, "timesteps": [1], "t_ratios": []}, "num_steps", ""),
    "another number of steps": ({"num_steps": 5, "solver_table": None}, "timesteps", "accepted: 6"),
    "a ratio too few": ({"t_ratios": [1, 1, 1]}, "t_ratios", "accepted: 4"),
    "rising times": ({"timesteps": [1, 0.5, 0.6, 0.2, 0]}, "timesteps", "falling"),
    "times beyond T": ({"timesteps": [1.5, 0.7, 0.5, 0.2, 0]}, "timesteps", "[0, 1"),
    "negative times": ({"timesteps": [1, 0.7, 0.5, 0.2, -0.1]}, "timesteps", "[0, 1"),
    "conditioning beyond T": ({"timesteps": [1, 0.7, 0.5, 0.2, 0], "t_ratios": [1.1, 1, 1, 1]}, "t_ratios", "(0, 1"),
    "conditioning below the first time": ({"t_ratios": [1, 1, 1e-6, 1]}, "t_ratios", "0.001 or above"),
    "a ratio of zero": ({"t_ratios": [1, 1, 0, 1]}, "t_ratios", "(0, 1"),
    "no numbers": ({"t_ratios": ["a", 1, 1, 1]}, "t_ratios", "number"),
    "negative guidance": ({"guidance_type": "classifier-free", "guidance_scale": -1}, "guidance_scale", "0"),
    "a solver of another number of steps": ({"solver_table": TWO_ROWS}, "solver_table.a", "accepted: 4"),
    "a solver with a row too few": (
        {"solver_table": {**FOUR_ROWS, "b": TWO_ROWS["b"]}},
        "solver_table.b",
        "accepted: 4 rows, of 1, 2 and so on",
    ),
    "a solver with a row per step of a sampler that calls the network twice": (
        {"solver_table": FOUR_ROWS, "sampler": "heun"},
        "solver_table.a",
        "one per network call",
    ),
    "a solver of several calls per step without their times": (
        {**TO_0, "solver_table": ROWS_OF_HEUN},
        "solver_table.times",
        "a step's first at its first time",
    ),
    "a solver of several calls per step with a time out of its step": (
        {**TO_0, "solver_table": {**ROWS_OF_HEUN, "times": [1, 0.7, 0.7, 0.4, 0.5, 0.2, 0.2]}},
        "solver_table.times",
        "a step's first at its first time",
    ),
    "times of calls for a sampler that calls the network once": (
        {"solver_table": {**FOUR_ROWS, "times": [1, 0.7, 0.5, 0.2]}},
        "solver_table.times",
        "accepted for 'ddim': none",
    ),
    "a number too few for eps": ({"solver_table": {**FOUR_ROWS, "eps": [0]}}, "solver_table.eps", "accepted: 4"),
    "a solver of a sampler whose every step adds noise": (
        {"solver_table": FOUR_ROWS, "sampler": "ddpm"},
        "sampler",
        "a sampler without noise",
    ),
    "a solver of a sampler that adds noise": ({"solver_table": FOUR_ROWS, "eta": 1}, "eta", "accepted, with a"),
    "a misspelt solver": ({"solver_table": {**FOUR_ROWS, "c": []}}, "solver_table.c", "accepted: a, b, eps, times"),
    "a figure it cannot bring": ({"score": 0.1}, "score", ""),
}


@pytest.mark.parametrize("name", BAD_IMPORTS)
def test_a_schedule_that_cannot_be_sampled_with_is_not_imported(stack: Stack, good: Json, name: str) -> None:
    changes, field, accepted = BAD_IMPORTS[name]
    newest = stack.client.get("/v1/schedules", params={"limit": 1}).json()
    answer = stack.client.post("/v1/schedules", json=exported(good, **changes))
    assert_problem(answer, 422, field, accepted)
    assert stack.client.get("/v1/schedules", params={"limit": 1}).json() == newest


@pytest.mark.parametrize("field", ["t_ratios", "provenance"])
def test_what_is_no_number_is_not_imported(client: httpx.Client, good: Json, field: str) -> None:
    bad = {"t_ratios": [1, float("nan"), 1, 1], "provenance": {"loss": float("inf")}}[field]
    body = json.dumps(exported(good, **{field: bad}))
    answer = client.post("/v1/schedules", content=body, headers={"Content-Type": "application/json"})
    assert_problem(answer, 422, field)


def test_a_schedule_is_deleted_unless_something_names_it(stack: Stack, model: str, good: Json) -> None:
    schedule_id = stack.client.post("/v1/schedules", json=exported(good)).json()["id"]
    url, alias = f"/v1/schedules/{schedule_id}", f"/v1/models/{model}/aliases/doomed"
    stack.client.put(alias, json={"schedule": schedule_id})
    assert_problem(stack.client.delete(url), 409, accepted="without any")
    named = {item["name"]: item["schedule"] for item in stack.client.get(alias.rpartition("/")[0]).json()["items"]}
    assert named["doomed"] == schedule_id
    assert stack.client.delete(alias).status_code == 204
    assert_problem(stack.client.delete(alias), 404)
    assert stack.client.delete(url).status_code == 204
    for method in ("GET", "DELETE"):
        assert_problem(stack.client.request(method, url), 404)

    sampled_with = stack.client.post("/v1/schedules", json=exported(good)).json()["id"]
    stack.client.post("/v1/samples", json={"model": model, "num_steps": 4, "schedule": sampled_with})
    assert_problem(stack.client.delete(f"/v1/schedules/{sampled_with}"), 409, accepted="samples")


def test_a_tuned_schedule_is_deleted_with_its_evaluation(stack: Stack, model: str) -> None:
    schedule = stack.tune(model, num_steps=8, **BAD)
    assert stack.client.delete(f"/v1/schedules/{schedule['id']}").status_code == 204
    assert_problem(stack.client.get(f"/v1/schedules/{schedule['id']}"), 404)
    job = stack.client.get(f"/v1/tuning-jobs/{schedule['job']}").json()
    assert (job["state"], job["schedule"]) == ("succeeded", None)


FIGURES = {
    "num_samples": 512,
    "teacher_num_steps": 100,
    "seed": 0,
    "teacher_l2_before": 1.0,
    "teacher_l2_after": 0.69,
    "teacher_l2_change_low": -0.35,
    "teacher_l2_change_high": -0.27,
    "frechet_before": None,
    "frechet_after": None,
    "metrics": {},
    "verdict": "accepted",
    "reason": "fell: teacher_l2",
    "wall_time_seconds": 1.0,
    "network_calls": 1,
}
UNTUNED = [{"num_steps": 5, "teacher_l2": 1.0}, {"num_steps": 20, "teacher_l2": 0.5}]
WORTH = {"num_steps": 14.2, "is_beyond": False, "grid": "log_snr", "teacher_l2": 0.69, "num_samples": 128}
CLOSER = "31% closer to the teacher of 100 steps (95 %: 27% to 35%), on 512 noises that tuning had not seen."


@pytest.mark.parametrize(
    ("changed", "summary"),
    [
        ({}, f"5 steps, as good as 14 untuned: 64% fewer. {CLOSER}"),
        ({"worth": WORTH | {"num_steps": None, "is_beyond": True}}, f"5 steps, better than 20 untuned. {CLOSER}"),
        ({"worth": WORTH | {"num_steps": 5.9}}, CLOSER),
        ({"worth": None}, CLOSER),
        # A sampler that adds noise is accepted for another reason than its distance to the teacher.
        ({"worth": None, "teacher_l2_change_high": 0.01}, "fell: teacher_l2"),
        ({"verdict": "undecided", "reason": "may have risen: frechet"}, "Undecided: may have risen: frechet."),
        ({"verdict": "rejected", "reason": "rose: kl"}, "Rejected: rose: kl."),
    ],
)
def test_an_evaluation_is_summed_up_in_a_sentence_or_two(changed: Json, summary: str) -> None:
    worth = {"worth": WORTH} | changed
    figures = FIGURES | changed | {"worth": worth["worth"] and worth["worth"] | {"untuned": UNTUNED}}
    assert EvaluationOut.model_validate(figures).summarised(5) == summary
