"""The API without PyTorch: what it does by itself, and what it waits for a worker to do."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.database import Registry
from service.registry.jobs import claim
from service.registry.models import next_registration
from service.registry.tables import ModelRegistration
from service.registry.types import FromNow
from service.shared.artifacts import ArtifactStore
from service.shared.queue import celery_app
from service.shared.settings import Settings
from timetuner_core.catalog import BUILTIN_FOLDERS
from worker.registering import register
from worker.retention import Sweeper
from worker.runtime import Runtime

HERE = "http://127.0.0.1"
LARGE = ("torch", "diffusers", "scipy", "matplotlib")
SERVING = f"""
import sys
from starlette.testclient import TestClient
from service.app import create_app
from service.registry.database import Registry
from service.shared.settings import Settings

settings = Settings(database_url=sys.argv[1], artifacts_url=sys.argv[2], broker_url="redis://127.0.0.1:1", auth="off")
Registry(settings.database_url).upgrade()
with TestClient(create_app(settings), "{HERE}", client=("127.0.0.1", 50000)) as client:
    model = client.post("/v1/models", json={{"builtin": "digits8"}}).json()["id"]
    grid = {{"num_steps": 2, "timesteps": [1.0, 0.5, 0.0], "t_ratios": [1.0, 0.9]}}
    schedule = client.post("/v1/schedules", json={{"model": model, **grid}})
    assert schedule.status_code == 201, schedule.text
    job = client.post("/v1/tuning-jobs", json={{"model": model, "num_steps": 3, "sampler": "heun"}})
    assert job.status_code == 202, job.text
    refused = client.post("/v1/samples", json={{"model": model, "num_steps": 2, "sampler": "heun", "eta": 1}})
    assert refused.status_code == 422, refused.text
    schedule_page = f"/schedules/{{schedule.json()['id']}}"
    for page in ("/", "/models", f"/models/{{model}}", "/schedules", schedule_page, "/openapi.json"):
        assert client.get(page).status_code == 200, page
assert not [name for name in {LARGE} if name in sys.modules]
"""


def test_requests_are_served_without_large_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVING, f"sqlite:///{tmp_path / 'registry.sqlite'}", f"file://{tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A deployment without workers and broker, where requests do not wait long."""
    url, broker = f"sqlite:///{tmp_path / 'registry.sqlite'}", "redis://127.0.0.1:1"
    artifacts = f"file://{tmp_path / 'artifacts'}"
    return Settings(database_url=url, artifacts_url=artifacts, broker_url=broker, auth="off", max_wait_seconds=0.1)


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    Registry(settings.database_url).upgrade()
    with TestClient(create_app(settings), HERE, client=("127.0.0.1", 50000)) as client:
        yield client


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    return Runtime(settings, celery_app(settings.broker_url))


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(BUILTIN_FOLDERS["digits8"], arcname=".")
    return buffer.getvalue()


def upload(api: TestClient, key: str = "first") -> tuple[int, dict[str, str]]:
    answer = api.post("/v1/models", files={"archive": archive()}, headers={"Idempotency-Key": key})
    return answer.status_code, answer.json()


def test_a_model_waits_for_a_worker_and_is_taken_over_from_one_that_is_lost(
    api: TestClient, runtime: Runtime, tmp_path: Path
) -> None:
    status, problem = upload(api)
    assert (status, problem["detail"].partition(";")[0]) == (503, "no worker described the model within 0.1 s")
    assert upload(api)[0] == 503  # The same request finds the same registration.
    assert api.get("/v1/models").json()["items"] == []
    assert len(list((tmp_path / "artifacts" / "models").iterdir())) == 1
    with runtime.registry.write() as session:
        waiting = next_registration(session)
        assert waiting is not None
        lost = claim(session, ModelRegistration, waiting, "a worker that is lost", 60)
        assert lost is not None
    assert not runtime.run(ModelRegistration, waiting, register)  # The other worker has it.
    with runtime.registry.write() as session:
        session.execute(update(ModelRegistration).values(lease_expires_at=FromNow(-1)))
        assert next_registration(session) == waiting
    assert runtime.run(ModelRegistration, waiting, register)
    status, model = upload(api)
    assert (status, model["id"]) == (200, waiting)
    assert upload(api, "another key")[1]["id"] == waiting


def test_what_cannot_be_described_says_so_and_its_files_go(
    api: TestClient, runtime: Runtime, settings: Settings, tmp_path: Path
) -> None:
    assert upload(api)[0] == 503
    with runtime.registry.read() as session:
        waiting = next_registration(session)
    assert waiting is not None

    def fail(*_: object) -> None:
        raise MemoryError("too large for this worker")

    assert runtime.run(ModelRegistration, waiting, fail)
    with runtime.registry.write() as session:
        registration = session.get_one(ModelRegistration, waiting)
        assert (registration.state, registration.model_id) == ("failed", None)
        assert registration.finished_at is not None
        after = registration.finished_at.replace(year=registration.finished_at.year + 1)
    Sweeper(runtime.registry, ArtifactStore(settings.artifacts_url), 1).sweep(after)
    assert not [path for path in (tmp_path / "artifacts" / "models").rglob("*") if path.is_file()]
    with runtime.registry.read() as session:
        assert session.get(ModelRegistration, waiting) is None
