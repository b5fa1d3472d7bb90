"""Models are deleted once nothing unfinished uses them, and what was made with them stays readable."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.tables import JobState, SampleJob, TuningJob
from service.shared.job_requests import TuningJobRequest
from service.shared.settings import Settings
from service.state import AppState
from tests.service.problems import assert_problem

pytestmark = pytest.mark.both_engines


@pytest.fixture
def client(database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    """An API alone, without a broker or a worker."""
    app = create_app(Settings(timetuner_home=tmp_path, database_url=database_url, broker_url="redis://127.0.0.1:1/0"))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        yield client


def state_of(client: TestClient) -> AppState:
    app: Any = client.app
    assert isinstance(app, FastAPI)
    state: AppState = app.state.timetuner
    return state


def register(client: TestClient) -> str:
    answer = client.post("/v1/models", json={"builtin": "mixture-ring"})
    assert answer.status_code == 201
    model_id: str = answer.json()["id"]
    return model_id


def import_schedule(client: TestClient, model: str) -> str:
    body = {"model": model, "num_steps": 2, "timesteps": [1.0, 0.5, 0.001], "t_ratios": [0.98, 0.95]}
    answer = client.post("/v1/schedules", json=body)
    assert answer.status_code == 201, answer.text
    schedule: str = answer.json()["id"]
    return schedule


def test_what_uses_a_model_is_named_until_its_jobs_are_over_and_its_schedules_are_to_go(client: TestClient) -> None:
    model = register(client)
    tuning = client.post("/v1/tuning-jobs", json={"model": model, "num_steps": 2}).json()["id"]
    body = {"model": model, "num_steps": 2, "schedule": "none"}
    sampling = client.post("/v1/samples", json=body, headers={"Prefer": "respond-async"}).json()["id"]
    schedule = import_schedule(client, model)
    client.put(f"/v1/models/{model}/aliases/production", json={"schedule": schedule})
    url = f"/v1/models/{model}"

    for query in ("", "?cascade=true"):
        answer = client.delete(url + query)
        assert_problem(answer, 409, accepted="whose jobs are over")
        assert tuning in answer.json()["detail"]
        assert sampling in answer.json()["detail"]
    for job in (f"/v1/tuning-jobs/{tuning}", f"/v1/samples/{sampling}"):
        assert client.post(f"{job}/cancel").json()["state"] == "cancelled"
    answer = client.delete(url)
    assert_problem(answer, 409, accepted="cascade=true")
    assert schedule in answer.json()["detail"]
    assert tuning not in answer.json()["detail"]
    assert client.get(url).status_code == 200

    assert client.delete(url, params={"cascade": True}).status_code == 204
    assert_problem(client.delete(url), 404)


def test_jobs_and_samples_of_a_deleted_model_stay_readable_and_nothing_else_of_it(client: TestClient) -> None:
    model = register(client)
    schedule = import_schedule(client, model)
    state = state_of(client)
    images = np.zeros((1, 2), np.float32)
    state.artifacts.put_array("samples/one.npy", images)
    common: dict[str, Any] = {"model_id": model, "state": JobState.SUCCEEDED, "progress": 1.0}
    request: Any = {"model": model, "num_steps": 2}
    with state.registry.write() as session:
        job = TuningJob(**common, request=TuningJobRequest(**request).model_dump(mode="json"))
        samples = SampleJob(
            **common, request=request, request_hash="", num_images=1, schedule_id=schedule, artifact="samples/one.npy"
        )
        session.add_all([job, samples])
    assert client.delete(f"/v1/models/{model}", params={"cascade": True}).status_code == 204

    assert client.get(f"/v1/tuning-jobs/{job.id}").json()["model"] == model
    assert [row["id"] for row in client.get("/v1/tuning-jobs").json()["items"]] == [job.id]
    content = client.get(f"/v1/samples/{samples.id}/content", headers={"Accept": "application/json"})
    assert content.status_code == 200
    assert content.headers["TimeTuner-Schedule"] == schedule

    for url in (f"/v1/models/{model}", f"/v1/models/{model}/aliases", f"/v1/schedules/{schedule}"):
        assert_problem(client.get(url), 404)
    for url in ("/v1/models", "/v1/schedules", f"/v1/schedules?model={model}"):
        assert client.get(url).json()["items"] == []
    for url in ("/v1/tuning-jobs", "/v1/samples"):
        assert_problem(client.post(url, json=request), 422, accepted="a registered model")
    assert_problem(client.get("/v1/schedules/resolve", params=request), 422, accepted="a registered model")
    assert_problem(client.post("/v1/tuning-jobs", json=request | {"model": "mixture-ring"}), 422, accepted="the id of")

    assert "which was deleted" in client.get(f"/jobs/{job.id}").text
    again = register(client)
    assert again != model
    assert [row["id"] for row in client.get("/v1/models").json()["items"]] == [again]
    for page in ("/", "/models", "/jobs", "/schedules", "/compare", "/playground"):
        assert model not in client.get(page).text


def test_the_page_deletes_a_model_and_says_why_if_it_cannot(client: TestClient) -> None:
    model = register(client)
    schedule = import_schedule(client, model)
    assert "Delete this model" in client.get(f"/models/{model}").text
    own = {"Origin": "http://127.0.0.1"}
    refused = client.post(f"/models/{model}/delete", headers=own)
    assert refused.status_code == 409
    assert schedule in refused.text
    answer = client.post(f"/models/{model}/delete", headers=own, data={"cascade": "true"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/models")
    assert client.get(f"/v1/models/{model}").status_code == 404
