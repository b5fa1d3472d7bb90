"""Pages of a new service, without any worker."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.keys import Scope, create_key
from service.registry.tables import Schedule, ScheduleStatus, TuningJob
from service.shared.settings import Settings
from service.web import endpoints

BUTTON = "Tune the bundled model now"


@contextmanager
def serving(database_url: str, home: Path, auth: str) -> Iterator[TestClient]:
    settings: Any = {"timetuner_home": home, "database_url": database_url, "broker_url": "redis://127.0.0.1:1/0"}
    app = create_app(Settings(**settings, auth=auth))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        yield client


@pytest.fixture
def client(database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    with serving(database_url, tmp_path, "off") as client:
        yield client


def test_an_empty_home_teaches_and_tunes_the_bundled_model_by_one_button(client: TestClient) -> None:
    html = client.get("/").text
    assert BUTTON in html and "Three steps" in html and '<svg class="idea"' in html
    answer = client.post("/start", headers={"Sec-Fetch-Site": "same-origin"}, follow_redirects=False)
    assert answer.status_code == 303
    job = client.get(answer.headers["location"].replace("/jobs/", "/v1/tuning-jobs/")).json()
    assert (job["state"], job["request"]["num_steps"]) == ("queued", 5)
    assert client.get(f"/v1/models/{job['model']}").json()["name"] == "digits8"
    html = client.get("/").text
    assert BUTTON not in html and job["id"][-8:] in html


@pytest.fixture
def model(client: TestClient) -> str:
    id: str = client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
    return id


def test_pages_show_a_job_whose_row_lacks_what_has_a_default(client: TestClient, model: str) -> None:
    state: Any = client.app.state.timetuner  # type: ignore[attr-defined]
    with state.registry.write() as session:
        job = TuningJob(model_id=model, request={"model": model, "num_steps": 5})
        session.add(job)
    for path in ("/", "/jobs", f"/models/{model}"):
        assert "5 steps of ddim" in client.get(path).raise_for_status().text
    assert "objective solver" in client.get(f"/jobs/{job.id}").raise_for_status().text


def test_the_matrix_says_what_it_leaves_out(client: TestClient, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def notes() -> list[str]:
        return re.findall("Only the newest (.*) are looked at", client.get("/matrix").text)

    assert notes() == []
    client.post("/v1/models", json={"builtin": "digits8"})
    schedule = {"model": model, "num_steps": 1, "timesteps": [1.0, 0.001], "t_ratios": [1.0]}
    for _ in range(2):
        assert client.post("/v1/schedules", json=schedule).status_code == 201
    state: Any = client.app.state.timetuner  # type: ignore[attr-defined]
    with state.registry.write() as session:
        session.execute(update(Schedule).values(status=ScheduleStatus.REJECTED))
    monkeypatch.setattr(endpoints, "MATRIX_SCHEDULES", 1)
    monkeypatch.setattr(endpoints, "MODELS_IN_FORM", 1)
    assert notes() == ["1 models"]  # The newest model has no schedule.
    monkeypatch.setattr(endpoints, "MODELS_IN_FORM", 2)
    assert notes() == ["1 schedules"]


def test_another_site_starts_nothing(client: TestClient) -> None:
    assert client.post("/start", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


@pytest.mark.parametrize(
    ("scopes", "may"),
    [((Scope.TUNE,), False), ((Scope.MODELS_WRITE,), False), ((Scope.TUNE, Scope.MODELS_WRITE), True)],
)
def test_only_a_key_that_may_register_and_tune_has_the_button(
    database_url: str, tmp_path: Path, scopes: tuple[Scope, ...], may: bool
) -> None:
    with serving(database_url, tmp_path, "on") as client:
        state: Any = client.app.state.timetuner  # type: ignore[attr-defined]
        with state.registry.write() as session:
            _, text = create_key(session, "test", scopes)
        headers = {"Cookie": f"timetuner_key={text}", "Sec-Fetch-Site": "same-origin"}
        assert (BUTTON in client.get("/", headers=headers).text) == may
        answer = client.post("/start", headers=headers, follow_redirects=False)
        assert answer.status_code == (303 if may else 403)


def test_an_error_page_leads_back_by_the_navigation(client: TestClient) -> None:
    answer = client.get("/nowhere", headers={"Accept": "text/html"})
    assert answer.status_code == 404
    for path in ("/models", "/jobs", "/schedules", "/matrix", "/playground"):
        assert f'<a href="{path}">' in answer.text
