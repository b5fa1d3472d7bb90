"""The API without PyTorch: what it does by itself, and what it waits for a worker to do."""

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import httpx
import pytest
from safetensors.torch import load_file, save_file
from sqlalchemy import update
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.app import create_app
from service.client import InvalidError, NotReadyError, TimeTuner
from service.registry.database import Registry
from service.registry.jobs import claim
from service.registry.models import next_registration
from service.registry.tables import ModelRegistration
from service.registry.types import FromNow
from service.shared.artifacts import ArtifactStore
from service.shared.queue import celery_app
from service.shared.settings import Settings
from tests.service.problems import assert_problem
from timetuner_core.catalog import BUILTIN_FOLDERS
from worker.describing import Describer
from worker.lease import Lease
from worker.registering import register
from worker.retention import Sweeper
from worker.runtime import Runtime

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
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
    return packed(BUILTIN_FOLDERS["digits8"])


def packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, arcname=".")
    return buffer.getvalue()


def upload(api: TestClient, key: str = "first", prefer: str = "", content: bytes | None = None) -> httpx.Response:
    headers = {"Idempotency-Key": key} | ({"Prefer": prefer} if prefer else {})
    return api.post("/v1/models", files={"archive": content or archive()}, headers=headers)


def unusable() -> bytes:
    """A model whose weights are finite, and whose outputs are not."""
    with TemporaryDirectory() as name:
        folder = Path(shutil.copytree(BUILTIN_FOLDERS["digits8"], Path(name) / "model"))
        weights = load_file(folder / WEIGHTS)
        weights["conv_out.weight"] = 3e38 * weights["conv_out.weight"].sign()
        save_file(weights, folder / WEIGHTS)
        return packed(folder)


def described(runtime: Runtime, work: Callable[[Runtime, Lease], None] = register) -> str:
    """The id of the registration that a worker took in this process."""
    with runtime.registry.read() as session:
        waiting = next_registration(session)
    assert waiting is not None
    assert runtime.run(ModelRegistration, waiting, work)
    return waiting


def fail(*_: object) -> None:
    raise MemoryError("too large for this worker")


def test_an_upload_is_followed_to_a_model_that_can_be_sampled(api: TestClient, runtime: Runtime) -> None:
    accepted = upload(api, prefer="respond-async")
    assert (accepted.status_code, accepted.headers["Preference-Applied"]) == (202, "respond-async")
    place = accepted.headers["Location"]
    queued = accepted.json()
    assert (queued["state"], queued["problem"], place) == ("queued", None, f"/v1/models/{queued['id']}")
    assert api.get(place).json() == queued
    states: list[str] = []

    def look(runtime: Runtime, lease: Lease) -> None:
        states.append(api.get(place).json()["state"])
        register(runtime, lease)

    assert described(runtime, look) == queued["id"]
    assert states == ["running"]
    ready = api.get(place).json()
    assert (ready["state"], ready["id"], ready["spec"]["num_classes"]) == ("ready", queued["id"], 10)
    assert [model["id"] for model in api.get("/v1/models").json()["items"]] == [ready["id"]]
    sampled = {"model": ready["id"], "num_steps": 2}
    assert api.post("/v1/samples", json=sampled, headers={"Prefer": "respond-async"}).status_code == 202
    # Workers start where this one measured: the network's eps is wrong by a hundredth.
    t_start, error = ready["spec"]["t_start"], ready["spec"]["x0_error_at_start"]
    assert 0.8 < t_start < 0.9
    assert 1 < error < 1.2
    assert runtime.load_model(ready["id"]).noise_schedule.t_start == t_start


def test_a_request_that_waited_long_enough_is_answered_with_its_registration(api: TestClient, runtime: Runtime) -> None:
    first, again = upload(api), upload(api)
    assert (first.status_code, again.status_code) == (202, 202)
    assert "Preference-Applied" not in first.headers
    assert first.json() == again.json()
    assert upload(api, "another key", "wait=0").json()["id"] == first.json()["id"]
    described(runtime)
    model = upload(api)
    assert (model.status_code, model.json()["id"], model.json()["state"]) == (200, first.json()["id"], "ready")
    assert upload(api, content=unusable()).status_code == 409  # The key stands for another model.


def test_a_model_waits_for_a_worker_and_is_taken_over_from_one_that_is_lost(
    api: TestClient, runtime: Runtime, tmp_path: Path
) -> None:
    assert upload(api).status_code == 202
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
    model = upload(api)
    assert (model.status_code, model.json()["id"]) == (200, waiting)
    assert upload(api, "another key").json()["id"] == waiting


def test_a_model_that_kills_its_workers_is_refused_in_the_end(
    api: TestClient, settings: Settings, runtime: Runtime
) -> None:
    place = upload(api, prefer="respond-async").headers["Location"]
    celery, stopping = celery_app(settings.broker_url), Event()
    stopping.set()  # This test does without the thread.
    describer = Describer(settings, celery, stopping, lambda: runtime)
    for _ in range(settings.max_attempts):
        waiting = describer.next()
        assert waiting == api.get(place).json()["id"]
        with runtime.registry.write() as session:
            assert claim(session, ModelRegistration, waiting, "a worker that is lost", 60) is not None
            session.execute(update(ModelRegistration).values(lease_expires_at=FromNow(-1)))
    assert describer.next() is None
    refused = api.get(place).json()
    assert (refused["state"], refused["problem"]["status"]) == ("refused", 500)
    assert "its worker was lost 5 times" in refused["problem"]["detail"]


def test_a_refused_model_says_which_field_is_at_fault_wherever_it_is_named(api: TestClient, runtime: Runtime) -> None:
    place = upload(api, prefer="respond-async", content=unusable()).headers["Location"]
    model = place.rpartition("/")[2]
    aliases = f"{place}/aliases"
    assert_problem(api.get(aliases), 409, accepted="a model that is ready")
    described(runtime)
    refused = api.get(place).json()
    assert (refused["state"], refused["id"]) == ("refused", model)
    assert refused["problem"]["errors"][0]["loc"] == ["body", "archive", WEIGHTS]
    assert "gives values that are not finite" in refused["problem"]["detail"]
    answered = upload(api, content=unusable())
    assert_problem(answered, 422, WEIGHTS, "accepted: finite")
    assert {**answered.json(), "request_id": None} == {**refused["problem"], "request_id": None}
    for path in ("/v1/samples", "/v1/tuning-jobs"):
        named = api.post(path, json={"model": model, "num_steps": 2}, headers={"Prefer": "respond-async"})
        assert_problem(named, 422, "model", "accepted: a model that is ready")
        assert WEIGHTS in named.json()["detail"]
    assert_problem(api.get(aliases), 409, accepted="a model that is ready")
    assert api.get("/v1/models").json()["items"] == []
    assert api.get("/v1/models", params={"state": "refused"}).json()["items"] == [refused]
    assert api.get("/v1/models", params={"state": "queued"}).json()["items"] == []


def test_a_model_that_waits_cannot_be_used_or_deleted_and_a_refused_one_is_deleted_with_its_files(
    api: TestClient, runtime: Runtime, tmp_path: Path
) -> None:
    place = upload(api, prefer="respond-async").headers["Location"]
    model = {"model": place.rpartition("/")[2], "num_steps": 2}
    assert_problem(api.post("/v1/samples", json=model), 422, "model", "is queued: no worker has described it yet")
    assert_problem(api.delete(place), 409, accepted="a model that is ready")
    described(runtime, fail)
    assert api.get(place).json()["problem"]["detail"].endswith("MemoryError: too large for this worker")
    assert api.delete(place).status_code == 204
    assert_problem(api.get(place), 404)
    assert_problem(upload(api), 404)  # The same request finds that what it made is gone.
    assert not [path for path in (tmp_path / "artifacts" / "models").rglob("*") if path.is_file()]
    assert upload(api, "another key").status_code == 202


def test_a_key_of_a_request_that_was_accepted_finds_how_its_model_was_refused(
    api: TestClient, runtime: Runtime
) -> None:
    content = unusable()
    assert upload(api, prefer="respond-async", content=content).status_code == 202
    described(runtime)
    assert_problem(upload(api, prefer="respond-async", content=content), 422, WEIGHTS)
    with runtime.registry.read() as session:
        assert next_registration(session) is None  # It was not tried again.


def test_files_that_nothing_reads_are_named_with_the_model(api: TestClient, runtime: Runtime, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUILTIN_FOLDERS["digits8"], tmp_path / "model"))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/pytorch_model.bin").write_bytes(b"x")
    ignored = ["README.md", "safety_checker/pytorch_model.bin"]
    accepted = upload(api, content=packed(folder)).json()
    assert accepted["ignored_files"] == ignored
    described(runtime)
    assert api.get(f"/v1/models/{accepted['id']}").json()["ignored_files"] == ignored
    # The answer to another archive of the same content is about that archive.
    assert upload(api, "another key").json()["ignored_files"] == ["README.md"]
    assert api.post("/v1/models", json={"builtin": "mixture-ring"}).json()["ignored_files"] == []


def test_pages_follow_a_model_until_it_is_ready_and_say_why_it_was_refused(api: TestClient, runtime: Runtime) -> None:
    for content, shown in ((archive(), "Start tuning"), (unusable(), "gives values that are not finite")):
        model = upload(api, content=content, key=shown).json()["id"]
        page = api.get(f"/models/{model}")
        assert page.status_code == 200
        assert f'hx-get="/models/{model}" hx-trigger="every 2s"' in page.text
        assert ">queued<" in page.text
        assert f'href="/models/{model}">' in api.get("/models").text
        described(runtime)
        over = api.get(f"/models/{model}").text
        assert shown in over
        assert "<code>README.md</code>" in over
        assert "every 2s" not in over
    listed = api.get("/models").text
    assert listed.count(">refused<") == 1
    assert "gives values that are not finite" in listed


def client_of(api: TestClient) -> TimeTuner:
    """The Python client on the application in this process."""
    client = TimeTuner(HERE)
    client._http = api
    return client


@pytest.mark.filterwarnings("ignore:You should not use the 'timeout' argument")
def test_the_client_waits_for_the_model_or_the_refusal(
    api: TestClient, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(api)
    monkeypatch.setattr("time.sleep", lambda _seconds: described(runtime))  # A worker is faster than the client.
    model = client.models.create(archive=BUILTIN_FOLDERS["digits8"], name="mine")
    assert (model.name, model.state, model.spec.num_classes) == ("mine", "ready", 10)
    assert "README.md" in model.ignored_files[0]
    assert client.models.get(model.id) == model
    (tmp_path / "unusable.tar.gz").write_bytes(unusable())
    registration = client.models.submit(archive=tmp_path / "unusable.tar.gz")
    assert (registration.state, registration.problem) == ("queued", None)
    with pytest.raises(NotReadyError, match=f"model {registration.id} is queued"):
        client.models.get(registration.id)
    with pytest.raises(InvalidError, match="gives values that are not finite") as caught:
        registration.wait()
    assert caught.value.errors[0].loc[-1] == WEIGHTS
    assert [each.id for each in client.models.registrations(state="refused")] == [registration.id]
    assert [each.id for each in client.models.list()] == [model.id]
    commands = import_module("service.cli.models")
    monkeypatch.setattr(commands, "connected", lambda _url: nullcontext(client))
    [line] = CliRunner().invoke(commands.models, ["list", "--state", "refused"]).stdout.splitlines()[1:]
    assert line.split()[:3] == [registration.id, "unusable.tar.gz", "refused"]
    assert f"{WEIGHTS}: the network" in CliRunner().invoke(commands.models, ["show", registration.id]).stdout
    assert "README.md" in CliRunner().invoke(commands.models, ["show", model.id]).stdout
    client.models.delete(registration.id)
    assert list(client.models.registrations(state="refused")) == []


def test_what_cannot_be_described_says_so_and_its_files_go(
    api: TestClient, runtime: Runtime, settings: Settings, tmp_path: Path
) -> None:
    assert upload(api).status_code == 202
    waiting = described(runtime, fail)
    with runtime.registry.write() as session:
        registration = session.get_one(ModelRegistration, waiting)
        assert (registration.state, registration.model_id) == ("failed", None)
        assert registration.finished_at is not None
        after = registration.finished_at.replace(year=registration.finished_at.year + 1)
    Sweeper(runtime.registry, ArtifactStore(settings.artifacts_url), 1).sweep(after)
    assert not [path for path in (tmp_path / "artifacts" / "models").rglob("*") if path.is_file()]
    with runtime.registry.read() as session:
        assert session.get(ModelRegistration, waiting) is None
