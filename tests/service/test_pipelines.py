"""Registering whole pipelines over HTTP: from an archive, from a folder of the operator, and from a hub's cache."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.app import create_app
from service.client import TimeTuner
from service.models.archive import unpack
from service.registry.database import Registry
from service.registry.models import next_registration
from service.registry.tables import Model, ModelRegistration
from service.shared.artifacts import ArtifactStore
from service.shared.queue import celery_app
from service.shared.settings import Settings
from tests.core.pipelines.kinds import KINDS
from tests.core.pipelines.run import one_thread
from tests.service.problems import assert_problem
from timetuner_core.models.folder_files import ModelFormatError
from timetuner_core.pipelines.files import pipeline_hash
from timetuner_core.pipelines.inspecting import inspect_pipeline
from timetuner_core.pipelines.loading import load_pipeline
from worker import registering_pipelines
from worker.describing import Describer
from worker.pipeline_folders import PipelineFolders
from worker.registering import register
from worker.runtime import ChangedModelError, Runtime

pytestmark = pytest.mark.xdist_group("pipelines")

HERE = "http://127.0.0.1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    next(kind for kind in KINDS if kind.name == "sd15").build().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\n")
    return folder


@pytest.fixture
def models_dir(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "models/tiny")
    return tmp_path / "models"


@pytest.fixture
def cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with the pipeline `them/tiny`, whose snapshot is of links to blobs."""
    repository = tmp_path / "cache/models--them--tiny"
    shutil.copytree(saved, repository / "blobs")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    for path in (repository / "blobs").rglob("*"):
        if path.is_file():
            link = repository / "snapshots" / COMMIT / path.relative_to(repository / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(path, link.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository


@pytest.fixture
def settings(tmp_path: Path, models_dir: Path) -> Settings:
    """A deployment without workers and broker, where requests do not wait long."""
    url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    files = {"artifacts_url": f"file://{tmp_path / 'artifacts'}", "models_dir": models_dir}
    broker = "redis://127.0.0.1:1"
    return Settings(database_url=url, broker_url=broker, auth="off", max_wait_seconds=0.1, device="cpu", **files)


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    Registry(settings.database_url).upgrade()
    with TestClient(create_app(settings), HERE, client=("127.0.0.1", 50000)) as client:
        yield client


@pytest.fixture
def runtime(settings: Settings, api: TestClient) -> Runtime:
    return Runtime(settings, celery_app(settings.broker_url))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines are inspected in this process, which has imported the libraries already."""
    monkeypatch.setattr(registering_pipelines, "inspect_in_child", inspect_pipeline)


def packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, arcname="tiny")
    return buffer.getvalue()


def described(api: TestClient, runtime: Runtime, request: dict[str, Any]) -> dict[str, Any]:
    """The end of a registration, which a worker in this process takes."""
    accepted = api.post("/v1/models", headers=ASYNC, **request)
    assert accepted.status_code == 202, accepted.text
    with runtime.registry.read() as session:
        waiting = next_registration(session)
    assert waiting == accepted.json()["id"]
    assert runtime.run(ModelRegistration, waiting, register)
    answer: dict[str, Any] = api.get(accepted.headers["Location"]).json()
    return answer


def row(runtime: Runtime, model: dict[str, Any]) -> Model:
    with runtime.registry.read() as session:
        return session.get_one(Model, model["id"])


def image(folder: Path) -> torch.Tensor:
    pipeline = load_pipeline(folder)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(
        pipeline("a red square", num_inference_steps=2, generator=generator, output_type="np").images
    )


def change(folder: Path) -> None:
    weights = load_file(folder / UNET_WEIGHTS)
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, folder / UNET_WEIGHTS)


def test_an_archive_becomes_a_pipeline(api: TestClient, runtime: Runtime, saved: Path) -> None:
    """The worker inspects it in a process of its own."""
    upload = {"files": {"archive": ("tiny.tar.gz", packed(saved))}, "data": {"name": "tiny"}}
    model = described(api, runtime, upload)
    spec = model["spec"]
    stored = row(runtime, model).spec["scheduler_config"]
    assert stored == json.loads((saved / "scheduler/scheduler_config.json").read_text())
    facts = {
        "kind": "pipeline",
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "DDIMScheduler",
        "dtype": "float32",
        "output": "images",
        "image_shape": [3, 16, 16],
        "sample_shape": [4, 8, 8],
        "size_multiple": 8,
        "tunable": None,
        "flags_content": False,
        "licence": {"name": "ours", "source": "README.md"},
        "model_type": "noise",
        "num_train_timesteps": 1000,
    }
    assert {name: spec[name] for name in facts} == facts
    assert spec["call"]["guidance_scale"] == {"type": "number", "default": 7.5, "required": False}
    assert model["ignored_files"] == []
    page = api.get(f"/models/{model['id']}").text
    for shown in ("StableDiffusionPipeline, DDIMScheduler, float32", "ours (README.md)", "guidance_scale", "7.5"):
        assert shown in page
    again = api.post("/v1/models", **upload)
    assert (again.status_code, again.json()["id"]) == (200, model["id"])
    folder = runtime.pipeline_folder(row(runtime, model))
    torch.testing.assert_close(image(folder), image(saved))
    change(folder)
    with pytest.raises(ChangedModelError, match=r"the files of model 'tiny' .* have changed since it was registered"):
        runtime.pipeline_folder(row(runtime, model))


@pytest.mark.usefixtures("in_process")
def test_a_folder_of_the_operator_becomes_a_pipeline_and_stays(
    api: TestClient, runtime: Runtime, models_dir: Path
) -> None:
    model = described(api, runtime, {"json": {"path": "tiny", "dtype": "bfloat16"}})
    assert (model["name"], model["path"], model["hub"], model["spec"]["dtype"]) == ("tiny", "tiny", None, "bfloat16")
    again = described(api, runtime, {"json": {"path": "tiny", "dtype": "bfloat16"}})
    assert again == model
    other = described(api, runtime, {"json": {"path": "tiny", "name": "in full"}})
    assert (other["id"] != model["id"], other["spec"]["dtype"]) == (True, "float32")
    assert api.delete(f"/v1/models/{other['id']}").status_code == 204
    assert runtime.pipeline_folder(row(runtime, model)) == models_dir / "tiny"
    (models_dir / "tiny" / UNET_WEIGHTS).touch()  # The time is new, and the content is not.
    assert runtime.pipeline_folder(row(runtime, model)) == models_dir / "tiny"
    change(models_dir / "tiny")
    with pytest.raises(ChangedModelError, match="have changed since it was registered"):
        runtime.pipeline_folder(row(runtime, model))
    shutil.rmtree(models_dir / "tiny")
    with pytest.raises(ChangedModelError, match="there is no folder 'tiny' in MODELS_DIR"):
        runtime.pipeline_folder(row(runtime, model))


@pytest.mark.usefixtures("in_process")
def test_a_pipeline_in_the_cache_of_a_hub_is_pinned_to_its_commit(
    api: TestClient, runtime: Runtime, cache: Path
) -> None:
    model = described(api, runtime, {"json": {"hub": "them/tiny"}})
    assert (model["name"], model["hub"], model["revision"]) == ("tiny", "them/tiny", COMMIT)
    (cache / "refs/main").write_text("f" * 40)
    folder = runtime.pipeline_folder(row(runtime, model))
    assert folder == cache / "snapshots" / COMMIT
    absent = described(api, runtime, {"json": {"hub": "them/tiny"}})
    expected = "hub: 'them/tiny' at revision 'main' is not in the Hugging Face cache; accepted: "
    assert absent["problem"]["detail"].startswith(expected)
    assert absent["problem"]["errors"][0]["loc"] == ["body", "hub"]


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download asks for; it has the pipeline `them/tiny`, a pickle, and notes."""

    folder: Path
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        _, is_file, rest = path.partition("/them/tiny/resolve/")
        name = rest.partition("/")[2]
        if "/tree/" in path:
            files = [file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*.*")]
            tree = [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files]
            self._answer(json.dumps(tree).encode())
        elif not is_file:
            self._answer(json.dumps({"id": "them/tiny", "sha": COMMIT, "siblings": []}).encode())
        elif (self.folder / name).is_file():
            self.asked.append(name)
            self._answer((self.folder / name).read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        headers = {"Content-Length": len(content), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Type": "application/json"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.folder = Path(shutil.copytree(saved, tmp_path / "hub"))
    (Hub.folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (Hub.folder / "notes.md").write_text("nothing reads it")
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": str(tmp_path / "cache")}
    for name, value in {**environment, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", environment["HF_HUB_CACHE"])
    yield Hub
    server.shutdown()
    server.server_close()


def test_only_what_is_read_is_downloaded_and_only_if_that_is_allowed(
    settings: Settings, hub: type[Hub], saved: Path
) -> None:
    source = {"kind": "pipeline", "dtype": "auto", "hub": "them/tiny", "revision": "main"}
    artifacts = ArtifactStore(settings.artifacts_url)
    with pytest.raises(ModelFormatError, match="ALLOW_DOWNLOADS=true"):
        PipelineFolders(settings, artifacts).find(source)
    assert hub.asked == []
    folders = PipelineFolders(settings.model_copy(update={"allow_downloads": True}), artifacts)
    folder = folders.find(source)
    assert pipeline_hash(folder, "float32") == pipeline_hash(saved, "float32")
    assert {name for name in hub.asked if name.endswith((".bin", "notes.md"))} == set()
    (folder / UNET_WEIGHTS).unlink()  # An interrupted download is completed.
    assert pipeline_hash(folders.find(source), "float32") == pipeline_hash(saved, "float32")
    (hub.folder / "unet/code.py").write_text("print()")
    with pytest.raises(ModelFormatError, match=r"unet/code.py: it is code"):
        folders.find(source)


@pytest.mark.parametrize(
    ("request_body", "field", "accepted"),
    [
        ({"path": "../elsewhere"}, "path", "without '..'"),
        ({"path": "/etc"}, "path", "without '..'"),
        ({"path": "tiny", "hub": "them/tiny"}, "hub", ""),
        ({"path": "tiny", "revision": "main"}, "revision", ""),
        ({"path": "tiny", "dtype": "int8"}, "dtype", "bfloat16"),
        ({"hub": "tiny"}, "hub", ""),
        ({"hub": "../tiny"}, "hub", ""),
        ({"hub": "them/tiny", "revision": "../main"}, "revision", ""),
    ],
)
def test_a_request_that_names_no_folder_is_refused(
    api: TestClient, request_body: dict[str, str], field: str, accepted: str
) -> None:
    assert_problem(api.post("/v1/models", json=request_body), 422, field, accepted)
    assert api.get("/v1/models", params={"state": "queued"}).json()["items"] == []


@pytest.mark.filterwarnings("ignore:You should not use the 'timeout' argument")
def test_the_command_hands_in_folders(api: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    client = TimeTuner(HERE)
    client._http = api
    commands = import_module("service.cli.models")
    monkeypatch.setattr(commands, "connected", lambda *_args, **_options: nullcontext(client))

    def handed_in(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(commands.models, ["import", "--detach", *arguments])
        assert done.exit_code == 0, done.output
        with runtime.registry.read() as session:
            return session.get_one(ModelRegistration, done.stdout.strip()).source

    common = {"kind": "pipeline", "dtype": "bfloat16"}
    assert handed_in("--path", "tiny", "--dtype", "bfloat16") == {**common, "path": "tiny"}
    hub = handed_in("--hub", "them/tiny", "--revision", "v1", "--dtype", "bfloat16")
    assert hub == {**common, "hub": "them/tiny", "revision": "v1"}
    for wrong in ([], ["digits8", "--path", "tiny"]):
        refused = CliRunner().invoke(commands.models, ["import", *wrong])
        assert (refused.exit_code, "one of SOURCE, --path and --hub" in refused.output) == (2, True)


def test_no_path_is_accepted_without_a_folder_of_models(settings: Settings) -> None:
    Registry(settings.database_url).upgrade()
    app = create_app(settings.model_copy(update={"models_dir": None}))
    with TestClient(app, HERE, client=("127.0.0.1", 50000)) as api:
        answer = api.post("/v1/models", json={"path": "tiny"})
    assert_problem(answer, 422, "path", "a builtin, a hub's name, or an archive")
    assert "MODELS_DIR" in answer.json()["detail"]


def test_an_upload_that_says_what_it_is_not_is_refused(api: TestClient, saved: Path, tmp_path: Path) -> None:
    def upload(content: bytes, **fields: str) -> Any:
        return api.post("/v1/models", files={"archive": content}, data=fields)

    assert_problem(upload(packed(saved), kind="video"), 422, "kind", "auto, network or pipeline")
    assert_problem(upload(packed(saved), dtype="int8"), 422, "dtype", "float16")
    assert_problem(upload(packed(saved), kind="network", dtype="float16"), 422, "dtype", "a whole pipeline")
    shutil.copytree(saved, tmp_path / "broken")
    (tmp_path / "broken/unet/code.py").write_text("print()")
    assert_problem(upload(packed(tmp_path / "broken")), 422, "unet/code.py", "pipelines of diffusers without it")
    shutil.rmtree(tmp_path / "broken/unet")
    (tmp_path / "broken/model_index.json").unlink()
    assert_problem(upload(packed(tmp_path / "broken"), kind="pipeline"), 422, "model_index.json", "as diffusers saves")
    assert api.get("/v1/models", params={"state": "queued"}).json()["items"] == []
    assert not [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]


def test_an_archive_is_a_network_as_before_unless_it_is_a_whole_pipeline(saved: Path, tmp_path: Path) -> None:
    assert unpack(io.BytesIO(packed(saved)), tmp_path / "whole", 10**8).is_pipeline
    assert not unpack(io.BytesIO(packed(saved)), tmp_path / "network", 10**8, "network").is_pipeline
    assert not (tmp_path / "network/text_encoder").exists()
    partial = Path(shutil.copytree(saved, tmp_path / "partial"))
    (partial / "text_encoder/model.safetensors").rename(partial / "text_encoder/pytorch_model.bin")
    assert not unpack(io.BytesIO(packed(partial)), tmp_path / "pickled", 10**8).is_pipeline
    shutil.rmtree(partial / "text_encoder")
    assert not unpack(io.BytesIO(packed(partial)), tmp_path / "without", 10**8).is_pipeline


@pytest.mark.usefixtures("in_process")
def test_what_a_worker_refuses_leaves_nothing(
    api: TestClient, runtime: Runtime, models_dir: Path, cache: Path, tmp_path: Path
) -> None:
    """Links that lead out of the operator's folder or the cache, a folder that is not there, and a missing weight."""
    (models_dir / "link").symlink_to(cache / "blobs")
    linked = Path(shutil.copytree(models_dir / "tiny", models_dir / "linked")) / "vae/config.json"
    linked.unlink()
    linked.symlink_to(cache / "blobs/vae/config.json")
    snapshot = cache / "snapshots" / COMMIT / "vae/config.json"
    snapshot.unlink()
    snapshot.symlink_to(models_dir / "tiny/vae/config.json")
    partial = Path(shutil.copytree(models_dir / "tiny", models_dir / "partial")) / UNET_WEIGHTS
    weights = load_file(partial)
    del weights["conv_in.bias"]
    save_file(weights, partial)
    refused = {
        "path: 'link' leads out of MODELS_DIR; accepted: a folder below it": {"json": {"path": "link"}},
        "path: there is no folder 'none' in MODELS_DIR; accepted: ": {"json": {"path": "none"}},
        "vae/config.json: it is a link that leads out of MODELS_DIR; accepted: ": {"json": {"path": "linked"}},
        "vae/config.json: it is a link that leads out of the cache; accepted: ": {"json": {"hub": "them/tiny"}},
        f"{UNET_WEIGHTS}: tensor 'conv_in.bias' is missing; accepted: ": {
            "files": {"archive": packed(models_dir / "partial")}
        },
    }
    stopping = Event()
    stopping.set()  # This test does without the describer's thread.
    describer = Describer(runtime.settings, runtime.celery, stopping, lambda: runtime)
    for expected, request in refused.items():
        registration = described(api, runtime, request)
        assert registration["state"] == "refused"
        assert registration["problem"]["detail"].startswith(expected)
        describer._remove_unused_files(registration["id"])
    assert api.get("/v1/models").json()["items"] == []
    assert not [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
