"""MAX_STORED_BYTES: what is refused before it is stored, what makes room, and that the count is that of the files."""

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient
from ulid import ULID

from service.app import create_app
from service.registry.database import Registry
from service.registry.stored_bytes import NoRoomError, stored_bytes, take_bytes
from service.registry.tables import JobState, SampleJob
from service.registry.types import utc_now
from service.shared.artifacts import ArtifactStore, bytes_of_rows
from service.shared.settings import Settings
from tests.service.problems import assert_problem
from tests.worker.in_process import BROKER_URL, InProcess
from timetuner_core.catalog import BUILTIN_FOLDERS
from worker import retention
from worker.joining import join_one
from worker.retention import Sweeper

HERE = "http://127.0.0.1"
ASYNC = {"Prefer": "respond-async"}
StartApi = Callable[[int], TestClient]


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path / 'artifacts'}")


@pytest.fixture
def start_api(registry: Registry, database_url: str, tmp_path: Path) -> Iterator[StartApi]:
    """Starts an API with a quota, beside the worker of a test."""
    clients = []

    def start(most: int) -> TestClient:
        settings = Settings(
            timetuner_home=tmp_path, database_url=database_url, broker_url=BROKER_URL, max_stored_bytes=most
        )
        client = TestClient(create_app(settings), HERE, client=("127.0.0.1", 50000))
        clients.append(client)
        return client.__enter__()

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def stored(registry: Registry) -> int:
    with registry.read() as session:
        return stored_bytes(session)


def count(registry: Registry, artifacts: ArtifactStore) -> None:
    Sweeper(registry, artifacts, 0, max_stored_bytes=1).sweep_if_due()


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(BUILTIN_FOLDERS["digits8"], arcname=".")
    return buffer.getvalue()


def ring(api: TestClient) -> str:
    return cast(str, api.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"])


@pytest.mark.both_engines
def test_bytes_are_taken_by_no_two_and_a_count_forgets_nothing_that_was_taken_meanwhile(
    registry: Registry, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registry.write() as session:
        take_bytes(session, 60, 100)
    refusal = "41 bytes are needed, and 60 of MAX_STORED_BYTES=100 are taken"
    with registry.write() as session, pytest.raises(NoRoomError, match=refusal):
        take_bytes(session, 41, 100)
    assert stored(registry) == 60
    artifacts.put_array("samples/a.npy", np.zeros((2, 1, 4, 4), np.float32))
    size = artifacts.size

    def counted_while_others_store(key: str = "") -> int:
        with registry.write() as session:
            take_bytes(session, 7, 10**6)
        return size(key)

    monkeypatch.setattr(artifacts, "size", counted_while_others_store)
    count(registry, artifacts)
    (file,) = Path(artifacts.root).rglob("*.npy")
    assert stored(registry) == file.stat().st_size + 7


def test_without_a_quota_nothing_is_counted_or_refused(start_api: StartApi, registry: Registry) -> None:
    api = start_api(0)
    assert api.post("/v1/models", files={"archive": archive()}, headers=ASYNC).status_code == 202
    assert stored(registry) == 0
    assert "stored_bytes" not in api.get("/metrics").text


def test_an_upload_that_has_no_room_is_refused_and_leaves_nothing(
    start_api: StartApi, registry: Registry, artifacts: ArtifactStore
) -> None:
    def upload(api: TestClient) -> httpx.Response:
        return api.post("/v1/models", files={"archive": archive()}, headers=ASYNC)

    size = assert_problem(upload(start_api(1)), 507, "archive")["errors"][0]["input"]
    assert_problem(upload(start_api(size - 1)), 507, "archive", accepted=f"accepted: up to {size - 1} bytes")
    assert (artifacts.size(), stored(registry)) == (0, 0)
    api = start_api(size)
    assert upload(api).status_code == 202
    assert artifacts.size() == stored(registry) == size
    told = re.search(r"^timetuner_stored_bytes (.+)$", api.get("/metrics").text, re.MULTILINE)
    assert told is not None
    assert float(told[1]) == size


def test_a_request_whose_images_have_no_room_is_refused_before_it_is_queued(
    start_api: StartApi, registry: Registry
) -> None:
    size = bytes_of_rows(5, 8)  # The ring's samples are two floats.
    api = start_api(size)
    body = {"model": ring(api), "num_steps": 1}
    refused = api.post("/v1/samples", json={**body, "num_images": 6}, headers=ASYNC)
    assert_problem(refused, 507, "num_images", accepted=f"of MAX_STORED_BYTES={size} are taken")
    assert api.post("/v1/samples", json={**body, "num_images": 5}, headers=ASYNC).status_code == 202
    with registry.read() as session:
        assert session.query(SampleJob).count() == 1
    # A large request's parts are stored beside the file that they are joined in.
    large = api.post("/v1/samples", json={**body, "num_images": 48}, headers=ASYNC)
    needed = 2 * bytes_of_rows(48, 8)
    assert_problem(large, 507, accepted=f"{needed} bytes are needed")


def test_a_worker_stores_what_there_is_room_for_and_fails_the_rest_by_name(registry: Registry, tmp_path: Path) -> None:
    worker = InProcess(tmp_path, registry, max_stored_bytes=bytes_of_rows(3, 8), sample_batch_size=8)
    model = worker.model("mixture-ring")
    small, large = worker.submit(model, num_images=2), worker.submit(model, num_images=4, num_steps=4)
    worker.serve()
    assert worker.images(small).shape == (2, 2)
    job = worker.job(large)
    assert (job.state, job.artifact) == (JobState.FAILED, None)
    assert "the images could not be stored: " in (job.error or "")
    assert "MAX_STORED_BYTES" in (job.error or "")
    assert worker.artifacts.size() <= stored(registry) <= bytes_of_rows(3, 8)
    worker.close()


@pytest.mark.both_engines
def test_a_large_request_that_has_no_room_to_be_joined_fails(
    registry: Registry, artifacts: ArtifactStore, model_id: str
) -> None:
    job: dict[str, Any] = {"model_id": model_id, "request": {}, "request_hash": ""}
    artifacts.put_array("samples/parts.npy", np.zeros((4, 1, 2, 2), np.float32))
    with registry.write() as session:
        session.add(SampleJob(id="smp_whole", num_images=4, num_parts=2, **job))
    with registry.write() as session:
        for k in range(2):
            part = {"parent_id": "smp_whole", "first_image": 2 * k, "num_images": 2, "state": JobState.SUCCEEDED}
            session.add(SampleJob(artifact="samples/parts.npy", artifact_row=2 * k, **part, **job))
    end = join_one(registry, artifacts, "smp_whole", max_stored_bytes=10)
    assert end is not None
    assert end.state == JobState.FAILED
    assert "MAX_STORED_BYTES=10" in (end.error or "")
    assert artifacts.files("samples") == ["samples/parts.npy"]


@pytest.mark.both_engines
def test_the_oldest_samples_make_room_but_those_that_clients_may_be_fetching_stay(
    registry: Registry, artifacts: ArtifactStore, model_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "ROWS_PER_ROUND", 1)
    now, files = utc_now(), []
    for k, minutes in enumerate((50, 40, 30, 20, 2)):
        time = now - timedelta(minutes=minutes)
        files.append(f"samples/{ULID.from_datetime(time)}.npy")
        artifacts.put_array(files[k], np.zeros((1, 1, 16, 16), np.float32))
        with registry.write() as session:
            session.add(
                SampleJob(
                    id=f"smp_{ULID.from_datetime(time)}",
                    model_id=model_id,
                    request={},
                    request_hash="",
                    num_images=1,
                    state=JobState.SUCCEEDED,
                    artifact=files[0] if k == 2 else files[k],  # The first file holds the images of two requests.
                    created_at=time,
                    finished_at=time,
                )
            )
    artifacts.remove(files[2])
    each = artifacts.size(files[0])

    def left(most: int, keep_days: float = 7) -> list[str]:
        count(registry, artifacts)
        Sweeper(registry, artifacts, keep_days, max_stored_bytes=most).make_room()
        assert stored(registry) == artifacts.size()
        return sorted(artifacts.files("samples"))

    assert left(5 * each) == sorted({*files} - {files[2]})  # There is room.
    assert left(4 * each, keep_days=0) == sorted({*files} - {files[2]})  # They are kept for ever.
    assert left(4 * each) == sorted((files[0], files[3], files[4]))  # The second request's file went.
    assert left(each) == [files[4]]


def test_a_request_is_done_anew_whose_samples_made_room(
    start_api: StartApi, registry: Registry, artifacts: ArtifactStore
) -> None:
    api = start_api(10**6)
    body, headers = {"model": ring(api), "num_steps": 1}, {**ASYNC, "Idempotency-Key": "mine"}
    first = api.post("/v1/samples", json=body, headers=headers).json()["id"]
    with registry.write() as session:
        session.delete(session.get_one(SampleJob, first))
    again = [api.post("/v1/samples", json=body, headers=headers).json()["id"] for _ in range(2)]
    assert again[0] == again[1] != first
