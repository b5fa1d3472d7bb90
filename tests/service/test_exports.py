"""Exports of stored schedules over HTTP and by the client. tests/core/pipelines/test_exports.py tests their content."""

import base64
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.app import create_app
from service.client import Schedule as ClientSchedule
from service.client import calls
from service.registry.tables import Model
from service.schedules import exporting
from service.shared.settings import Settings
from tests.pipelines import register as register_pipeline
from tests.service.problems import assert_problem
from tests.stack import Json
from tests.worker.in_process import InProcess

GRID: Json = {"num_steps": 2, "timesteps": [1.0, 0.5, 0.001], "t_ratios": [0.98, 0.95]}


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    settings: Any = {"timetuner_home": tmp_path, "database_url": database_url, "broker_url": "redis://127.0.0.1:1/0"}
    with TestClient(
        create_app(Settings(**settings, auth="off")), base_url="http://127.0.0.1", client=("127.0.0.1", 1)
    ) as client:
        yield client


def register(api: TestClient, builtin: str) -> Json:
    model: Json = api.post("/v1/models", json={"builtin": builtin}).json()
    return model


def import_schedule(api: TestClient, model: Json, **fields: Any) -> Json:
    answer = api.post("/v1/schedules", json={"model": model["id"], **GRID, **fields})
    assert answer.status_code == 201, answer.text
    schedule: Json = answer.json()
    return schedule


def test_a_schedule_is_exported_as_a_file_that_says_what_it_cannot_carry(api: TestClient) -> None:
    model = register(api, "digits8")
    provenance = {"prompts": ["a", "b"], "seed": 3, "a|\n<b>": "`c`"}
    schedule = import_schedule(api, model, guidance_type="classifier-free", guidance_scale=2, provenance=provenance)
    url = f"/v1/schedules/{schedule['id']}/export"
    answer = api.get(url, params={"format": "diffusers"})
    assert answer.status_code == 200, answer.text
    # This is how the client reads it.
    exported = calls.export_schedule(schedule["id"], "diffusers", False).result(answer)
    assert (exported.file_name, exported.media_type) == (f"{schedule['id']}.zip", "application/zip")
    assert any("classifier-free guidance of scale 2" in sentence for sentence in exported.not_carried)
    with zipfile.ZipFile(io.BytesIO(exported.content)) as archive:
        config = json.loads(archive.read("scheduler/scheduler_config.json"))
        card = archive.read("README.md").decode()
    assert (config["timesteps"], config["t_ratios"]) == (GRID["timesteps"], GRID["t_ratios"])
    assert config["base_scheduler"]["_class_name"] == "DDPMScheduler"

    alone = api.get(url, params={"format": "card"}).text
    for text in (card, alone):
        assert 'license: "unknown"' in text and "unknown: ask the base model's authors" in text
        assert 'base_model: "digits8"' in text and model["content_hash"] in text
        assert "2 prompts, sha256" in text and "| `seed` | `3` |" in text
        assert "| `a/ <b>` | `'c'` |" in text  # Texts of others can hold no markup.
        assert "None: the schedule was imported." in text
        assert "num_inference_steps=2" in text

    refused = api.get(url, params={"format": "sigmas"})
    assert_problem(refused, 422, "format", accepted="lossy=true")
    assert "t_ratios are not carried" in refused.json()["detail"]
    page = api.get(f"/schedules/{schedule['id']}").text
    for name in ("json", "card", "diffusers", "sigmas", "comfyui", "comfyui-node", "sdcpp"):
        assert f'href="{url}?format={name}"' in page


def test_an_export_in_our_own_format_is_imported_for_the_same_model_only(api: TestClient) -> None:
    ring, gratings = register(api, "mixture-ring"), register(api, "mixture-gratings")
    schedule = import_schedule(api, ring)
    content = api.get(f"/v1/schedules/{schedule['id']}/export").json()
    assert content["model_content_hash"] == ring["content_hash"]
    copy = api.post("/v1/schedules", json=content)
    assert copy.status_code == 201, copy.text
    assert copy.json()["t_ratios"] == GRID["t_ratios"]

    elsewhere = content | {"model": gratings["id"]}
    assert_problem(api.post("/v1/schedules", json=elsewhere), 409, "model_content_hash", accepted="override=true")
    assert api.get("/v1/schedules", params={"model": gratings["id"]}).json()["items"] == []
    assert api.post("/v1/schedules", json=elsewhere | {"override": True}).status_code == 201


def test_an_export_of_a_pipelines_schedule_is_imported_with_its_sizes_and_arguments(
    api: TestClient, tmp_path: Path
) -> None:
    state: Any = api.app.state  # type: ignore[attr-defined]
    worker = InProcess(tmp_path, state.timetuner.registry)
    model, _ = register_pipeline(worker, "sd15")
    for_call: Json = {"height": 32, "width": 48, "call": {"guidance_rescale": 0.5}, "guidance_scale": 3}
    schedule = import_schedule(api, {"id": model}, sampler="ddim", **for_call)
    content = api.get(f"/v1/schedules/{schedule['id']}/export").json()
    assert {name: content[name] for name in for_call} == for_call
    copy = api.post("/v1/schedules", json=content)
    assert copy.status_code == 201, copy.text
    assert copy.json()["call"] == schedule["call"]
    assert copy.json()["version"] == schedule["version"] + 1  # The setting is the same.
    card = api.get(f"/v1/schedules/{schedule['id']}/export", params={"format": "card"}).text
    assert "guidance_scale=3" in card and '"guidance_rescale": 0.5' in card and '"width": 48' in card
    worker.close()


def test_a_model_without_a_diffusers_scheduler_is_refused_by_name(api: TestClient) -> None:
    schedule = import_schedule(api, register(api, "mixture-ring"))
    url = f"/v1/schedules/{schedule['id']}/export"
    refused = api.get(url, params={"format": "comfyui-node"})
    assert_problem(refused, 422, "format", accepted="json, card")
    assert "'mixture-ring' has no diffusers scheduler" in refused.json()["detail"]
    assert "comfyui" not in api.get(f"/schedules/{schedule['id']}").text
    assert_problem(api.get(url, params={"format": "onnx"}), 422, "format", accepted="'comfyui-node'")


def test_the_scheduler_of_a_pipeline_is_the_one_that_was_registered(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API may not reach the folder of a pipeline, so that a worker keeps its scheduler's configuration."""
    model = register(api, "digits8")
    schedule = import_schedule(api, model)
    state: Any = api.app.state  # type: ignore[attr-defined]
    config = {"_class_name": "EulerDiscreteScheduler"}
    with state.timetuner.registry.write() as session:
        row = session.get_one(Model, model["id"])
        row.source, row.spec = {"path": "tiny", "kind": "pipeline"}, row.spec | {"scheduler_config": config}
    echo = """
import base64, json, sys
config = json.dumps(json.load(sys.stdin)["scheduler_config"])
print(json.dumps({"content": base64.b64encode(config.encode()).decode(), "not_carried": []}))
"""
    monkeypatch.setattr(exporting, "python", lambda *_arguments: [sys.executable, "-c", echo])
    answer = api.get(f"/v1/schedules/{schedule['id']}/export", params={"format": "sigmas"})
    assert answer.json() == config


def test_an_api_without_pytorch_says_so(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = import_schedule(api, register(api, "digits8"))
    url = f"/v1/schedules/{schedule['id']}/export"

    def run_instead(program: str) -> None:
        monkeypatch.setattr(exporting, "python", lambda *_arguments: [sys.executable, "-c", program])

    run_instead("raise ModuleNotFoundError('No module named \\'torch\\'')")
    assert_problem(api.get(url, params={"format": "sdcpp"}), 501, accepted="json, card")
    monkeypatch.setattr(exporting, "EXPORT_SECONDS", 0.1)
    run_instead("import time; time.sleep(60)")
    late = api.get(url, params={"format": "sdcpp"})
    assert_problem(late, 503, accepted="the same request, later")
    assert late.headers["retry-after"] == "10"


IMAGE: Json = {"type": "image", "default": None, "required": True}


def test_a_schedule_whose_size_images_decided_is_imported_as_it_was(api: TestClient) -> None:
    state: Any = api.app.state.timetuner  # type: ignore[attr-defined]
    with state.registry.write() as session:
        spec = dict(session.get_one(Model, register(api, "digits8")["id"]).spec)
        size = {"type": "integer", "default": None, "required": False}
        spec |= {"kind": "pipeline", "call": {"image": IMAGE, "height": size, "width": size}, "size_multiple": 8}
        model = Model(name="p", content_hash="p", source={"artifact": "models/p", "kind": "pipeline"}, spec=spec)
        session.add(model)
    made = Image.new("RGB", (24, 16))
    made.save(buffer := io.BytesIO(), "png")
    picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    schedule = import_schedule(api, {"id": model.id}, call={"image": picture})
    assert schedule["call"] == {"image_sizes": [[24, 16]]}
    exported = api.get(f"/v1/schedules/{schedule['id']}/export?format=json").json()
    assert exported["image_sizes"] == [[24, 16]]
    for request in (exported, ClientSchedule.model_validate(schedule).to_import()):
        answer = api.post("/v1/schedules", json=request)
        assert answer.status_code == 201, answer.text
        assert (answer.json()["call"], answer.json()["version"] > 1) == (schedule["call"], True)
    for wrong in ({"call": {"image": picture}}, {"height": 16, "width": 24}):
        assert_problem(api.post("/v1/schedules", json=exported | wrong), 422, "image_sizes", "one of these")
    for value in ([], [[1]], [[0, 8]], "24x16"):
        assert_problem(api.post("/v1/schedules", json=exported | {"image_sizes": value}), 422, "image_sizes")
    network = register(api, "mixture-ring")["id"]
    problem = assert_problem(api.post("/v1/schedules", json=exported | {"model": network, "override": True}), 422)
    assert "image_sizes is given, and this model is a network" in problem["detail"]
