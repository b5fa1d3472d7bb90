"""Files that were deleted, cut or changed behind the service's back are noticed, and their images are made again."""

import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.database import Registry
from service.registry.tables import JobState, Model, SampleJob
from service.shared.artifacts import ArtifactStore, DamagedArtifactError
from tests.service.problems import assert_problem
from tests.stack import wait_until
from tests.worker.in_process import InProcess
from timetuner_core.catalog import BUILTIN_FOLDERS
from timetuner_core.models.folder_files import folder_hash
from worker.joining import join_all

KEY = "samples/a.npy"
ARRAY = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path / 'artifacts'}")


def test_every_changed_bit_of_what_is_read_is_noticed(artifacts: ArtifactStore, tmp_path: Path) -> None:
    artifacts.put_array(KEY, ARRAY)
    path = tmp_path / "artifacts" / KEY
    whole = path.read_bytes()
    np.testing.assert_array_equal(np.load(path), ARRAY)
    array_begins = whole.index(ARRAY.tobytes())
    second_row = array_begins + ARRAY[0].nbytes
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        is_of_another_row = array_begins <= place < second_row or place >= second_row + ARRAY[1].nbytes
        try:
            np.testing.assert_array_equal(artifacts.get_rows(KEY, 1, 1), ARRAY[1:2])
            assert is_of_another_row
        except DamagedArtifactError:
            pass
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length == array_begins + ARRAY.nbytes:  # Files of releases before there were digests ended so.
            np.testing.assert_array_equal(artifacts.get_rows(KEY, 0, 4), ARRAY)
            continue
        with pytest.raises(DamagedArtifactError):
            artifacts.get_rows(KEY, 0, 1)
    path.unlink()
    with pytest.raises(DamagedArtifactError, match="is missing"):
        artifacts.get_rows(KEY, 0, 1)


def test_files_and_their_folders_are_on_the_disk_before_they_are_said_to_be(
    artifacts: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path).as_posix())
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", noting)
    artifacts.put_array(KEY, ARRAY)
    first, *folders = flushed
    assert first.startswith("artifacts/partial/")
    assert folders == ["artifacts/samples", "artifacts"]
    shutil.rmtree(tmp_path / "artifacts" / "samples")
    flushed.clear()
    artifacts.put_array(KEY, ARRAY)
    assert flushed[1:] == ["artifacts/samples", "artifacts"]
    artifacts.put_array(f"{KEY}.next", ARRAY)
    assert flushed[4:] == ["artifacts/samples"]  # Nothing but the list of this folder has changed.
    np.testing.assert_array_equal(artifacts.get_rows(KEY, 0, len(ARRAY)), ARRAY)
    flushed.clear()
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "config.json").write_text("{}")
    artifacts.put_folder("models/m", tmp_path / "model")
    stored = "artifacts/models/m"
    assert set(flushed) == {f"{stored}/unet/config.json", f"{stored}/unet", stored, "artifacts/models", "artifacts"}


@pytest.fixture
def worker(registry: Registry, tmp_path: Path) -> Iterator[InProcess]:
    """A worker that samples whatever comes."""
    worker, over = InProcess(tmp_path, registry, keep_samples_days=7), threading.Event()

    def serve() -> None:
        while not over.wait(0.05):
            worker.serve()

    thread = threading.Thread(target=serve)
    thread.start()
    yield worker
    over.set()
    thread.join()
    worker.close()


@pytest.fixture
def api(worker: InProcess) -> Iterator[TestClient]:
    with TestClient(create_app(worker.settings), "http://127.0.0.1", client=("127.0.0.1", 50000)) as client:
        yield client


@pytest.fixture
def ring(api: TestClient) -> str:
    model_id: str = api.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
    return model_id


def arrays(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    array: NDArray[np.float32] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return array


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[140] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-70]),
    "a flipped bit": flip,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_images_whose_file_is_damaged_are_made_again(
    api: TestClient, worker: InProcess, ring: str, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    request, accept = {"model": ring, "num_steps": 3, "seed": 8, "num_images": 3}, {"Accept": "application/x-npy"}
    first = api.post("/v1/samples", json=request, headers=accept)
    images = arrays(first)
    (file,) = (tmp_path / "artifacts" / "samples").iterdir()
    damage(file)
    lost = api.get(first.headers["content-location"], headers=accept)
    assert_problem(lost, 503, accepted="were damaged, and are sampled again")
    assert "retry-after" in lost.headers
    again = api.post("/v1/samples", json=request, headers=accept)
    np.testing.assert_array_equal(arrays(again), images)
    job_id = first.headers["content-location"].split("/")[3]
    wait_until(lambda: worker.job(job_id).state == JobState.SUCCEEDED, "end", 20)
    np.testing.assert_array_equal(arrays(api.get(first.headers["content-location"], headers=accept)), images)


def test_a_request_whose_parts_are_damaged_fails_and_says_so_and_others_are_joined(
    registry: Registry, artifacts: ArtifactStore, tmp_path: Path, model_id: str
) -> None:
    job = {"model_id": model_id, "request": {}, "request_hash": ""}
    with registry.write() as session:
        for name in ("bad", "good"):
            session.add(SampleJob(id=f"smp_{name}", num_images=4, num_parts=2, **job))
    with registry.write() as session:
        for name in ("bad", "good"):
            artifacts.put_array(f"samples/{name}.npy", ARRAY)
            for k in range(2):
                part = {"parent_id": f"smp_{name}", "first_image": 2 * k, "num_images": 2, "state": JobState.SUCCEEDED}
                session.add(SampleJob(artifact=f"samples/{name}.npy", artifact_row=2 * k, **part, **job))
    path = tmp_path / "artifacts" / "samples" / "bad.npy"
    path.write_bytes(path.read_bytes()[:-100])
    ends = join_all(registry, artifacts, ["smp_bad", "smp_good"])
    assert [(end.job_id, end.state) for end in ends] == [("smp_bad", "failed"), ("smp_good", "succeeded")]
    assert (ends[0].error or "").startswith("the images of a part were damaged: samples/bad.npy is damaged")
    np.testing.assert_array_equal(artifacts.get_rows(ends[1].artifact or "", 0, 4), ARRAY)


def test_a_model_whose_files_have_changed_is_not_sampled_and_the_error_names_it(
    worker: InProcess, registry: Registry, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN_FOLDERS["digits8"], folder)
    worker.artifacts.put_folder("models/m", folder)
    with registry.write() as session:
        source = {"artifact": "models/m"}
        session.add(Model(id="mdl_1", name="my digits", content_hash=folder_hash(folder), source=source, spec={}))
    weights = tmp_path / "artifacts" / "models" / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    job_id = worker.submit("mdl_1")
    wait_until(lambda: worker.job(job_id).finished_at, "end", 60)
    job = worker.job(job_id)
    assert job.state == JobState.FAILED
    assert "the files of model 'my digits' (mdl_1) have changed since it was registered" in (job.error or "")
