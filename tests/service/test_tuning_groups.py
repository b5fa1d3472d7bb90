"""Several tuning jobs in one request: all are queued, or none, and they are priced together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.jobs import finish
from service.registry.keys import Scope, create_key
from service.registry.tables import AuditEntry, JobState, TuningJob
from service.shared.settings import Settings
from service.state import AppState
from tests.stack import Json

GROUPS = "/v1/tuning-groups"


class World:
    """An API in this process, without workers, and keys for it."""

    def __init__(self, client: TestClient, state: AppState) -> None:
        self.client, self.state = client, state
        self.owner = self.key()
        answer = client.post("/v1/models", json={"builtin": "mixture-ring"}, headers=self.owner)
        self.model: str = answer.json()["id"]

    def key(self, **limits: Any) -> dict[str, str]:
        with self.state.registry.write() as session:
            _, text = create_key(session, "test", (Scope.TUNE, Scope.MODELS_WRITE), **limits)
        return {"Authorization": f"Bearer {text}"}

    def job(self, num_steps: int, **more: Any) -> Json:
        return {"model": self.model, "num_steps": num_steps, **more}

    def post(self, jobs: list[Json], headers: dict[str, str] | None = None, **more: Any) -> Any:
        given = (headers or self.owner) | more.pop("extra", {})
        return self.client.post(GROUPS, json={"jobs": jobs, **more}, headers=given)

    def count(self) -> int:
        with self.state.registry.read() as session:
            return session.scalar(select(func.count()).select_from(TuningJob)) or 0


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    settings: Any = {"timetuner_home": tmp_path, "database_url": database_url, "broker_url": "redis://127.0.0.1:1/0"}
    app = create_app(Settings(**settings, auth="on", max_queued_jobs=12))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        yield World(client, app.state.timetuner)


def test_jobs_that_are_submitted_together_are_shown_as_one(world: World) -> None:
    tuner = {"objective": "dmn"}
    answer = world.post([world.job(3), world.job(2, tuner=tuner), world.job(4)])
    assert answer.status_code == 202, answer.text
    group = answer.json()
    assert answer.headers["location"] == f"{GROUPS}/{group['id']}"
    assert [job["request"]["num_steps"] for job in group["jobs"]] == [3, 2, 4]
    assert group["jobs"][1]["request"]["tuner"]["objective"] == "dmn"
    assert {job["group"] for job in group["jobs"]} == {group["id"]}
    with world.state.registry.write() as session:
        jobs = [session.get_one(TuningJob, job["id"]) for job in group["jobs"]]
        finish(session, jobs[0], JobState.SUCCEEDED)
        finish(session, jobs[1], JobState.FAILED, "as the test has it")
        jobs[2].progress = 0.5
        entry = session.scalars(select(AuditEntry).where(AuditEntry.action == "submit_tuning_group")).one()
        assert entry.object == group["id"]
    now = world.client.get(answer.headers["location"], headers=world.owner).json()
    assert [job["state"] for job in now["jobs"]] == ["succeeded", "failed", "queued"]
    assert (now["progress"], now["is_over"]) == (pytest.approx(0.5), False)
    with world.state.registry.write() as session:
        finish(session, session.get_one(TuningJob, group["jobs"][2]["id"]), JobState.CANCELLED)
    assert world.client.get(answer.headers["location"], headers=world.owner).json()["is_over"] is True
    assert world.client.get(answer.headers["location"], headers=world.key()).status_code == 404


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"guidance_scale": 3}, "guidance_scale"),
        ({"timesteps": [1.0, 0.5]}, "timesteps"),
        ({"tuner": {"total_iter": 3}}, "total_iter"),
        ({"model": "mdl_none"}, "model"),
    ],
)
def test_one_wrong_job_has_none_queued_and_is_named(world: World, wrong: Json, field: str) -> None:
    for dry_run in (True, False):
        answer = world.post([world.job(3), world.job(2) | wrong], dry_run=dry_run)
        assert answer.status_code == 422, answer.text
        [fault] = answer.json()["errors"]
        assert fault["loc"][:3] == ["body", "jobs", 1] and fault["loc"][-1] == field
    assert world.count() == 0


def test_a_group_that_finds_no_room_or_exceeds_the_quota_has_none_queued(world: World) -> None:
    answer = world.post([world.job(2)] * 7)
    assert (answer.status_code, world.count()) == (429, 0)
    assert answer.json()["detail"].startswith("jobs[6]: 6 jobs of this API key")
    one = world.post([world.job(2)], dry_run=True).json()["cost"]
    poor = world.key(pixel_steps_per_day=3 * one)  # A sample has two values, so that one job costs 2 * one.
    assert world.post([world.job(2), world.job(2)], poor).status_code == 429
    assert world.count() == 0
    assert world.post([world.job(2)], poor).status_code == 202


def test_a_dry_run_prices_jobs_together_by_the_pace_of_the_callers_earlier_ones_and_queues_none(world: World) -> None:
    costs = [world.post([world.job(steps)], dry_run=True).json()["cost"] for steps in (2, 5)]
    assert 0 < costs[0] < costs[1]
    answer = world.post([world.job(2), world.job(5)], dry_run=True)
    assert answer.status_code == 200
    expected = {"id": None, "cost": sum(costs), "seconds": None, "progress": 0.0, "is_over": False, "jobs": []}
    assert answer.json() == expected
    assert world.count() == 0
    submitted = world.post([world.job(2)]).json()
    assert submitted["cost"] == costs[0]
    with world.state.registry.write() as session:
        job = session.get_one(TuningJob, submitted["jobs"][0]["id"])
        job.state, job.network_calls, job.tuning_seconds = JobState.SUCCEEDED, 1000, 5.0
    assert world.post([world.job(5)], dry_run=True).json()["seconds"] == pytest.approx(costs[1] * 5 / 1000)
    assert world.post([world.job(5)], world.key(), dry_run=True).json()["seconds"] is None


def test_a_group_sent_twice_with_its_key_is_made_once(world: World) -> None:
    extra = {"Idempotency-Key": "once"}
    first, second = (world.post([world.job(2), world.job(3)], extra=extra).json() for _ in range(2))
    assert [job["id"] for job in first["jobs"]] == [job["id"] for job in second["jobs"]]
    assert (first["id"], world.count()) == (second["id"], 2)
    assert world.post([world.job(2)], extra=extra).status_code == 409


def test_a_group_has_one_to_fifty_jobs(world: World) -> None:
    for jobs in ([], [world.job(2)] * 51):
        assert world.post(jobs).status_code == 422


def test_the_page_submits_several_numbers_of_steps_and_tuners_as_a_group_and_says_what_they_cost(world: World) -> None:
    text = world.owner["Authorization"].removeprefix("Bearer ")
    headers = {"Cookie": f"timetuner_key={text}", "Sec-Fetch-Site": "same-origin"}
    form: Any = {"model": world.model, "num_steps": "3, 2", "objective": ["dmn", "ays"]}
    jobs = [world.job(steps, tuner={"objective": name}) for steps in (3, 2) for name in ("dmn", "ays")]
    cost = f"{world.post(jobs, dry_run=True).json()['cost']:,}".replace(",", "\u202f")
    priced = world.client.post("/jobs/price", data=form, headers=headers)
    assert priced.text.strip() == f"4 jobs: at most {cost} samples through the network."
    refused = world.client.post(
        "/jobs/price", data={"model": world.model, "num_steps": 2, "guidance_scale": 3}, headers=headers
    )
    assert refused.text.startswith("This would be refused: guidance_scale is 3; accepted: 1")
    assert world.count() == 0
    answer = world.client.post("/jobs", data=form, headers=headers, follow_redirects=False)
    assert answer.status_code == 303, answer.text
    html = world.client.get(answer.headers["location"], headers=headers).text
    assert answer.headers["location"].startswith("/groups/grp_")
    for steps in (3, 2):
        for name in ("dmn", "ays"):
            assert f'{steps} steps of ddim <span class="quiet">by {name}</span>' in html
    wrong = world.client.post("/jobs", data=form | {"num_steps": "3, many"}, headers=headers)
    assert wrong.status_code == 422 and "num_steps" in wrong.text
