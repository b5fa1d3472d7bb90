"""Pages of a new service, without any worker."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.keys import Scope, create_key
from service.shared.settings import Settings

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
