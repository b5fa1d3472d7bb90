"""Refusals name the field as it was sent and what is accepted, and tell nothing of our code."""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.shared import sampler_facts
from service.shared.settings import Settings
from tests.conftest import MakeDatabaseUrl
from tests.packages import MIDPOINT, install
from timetuner_core.catalog import BUNDLED

JOBS, SAMPLES = "/v1/tuning-jobs", "/v1/samples"
INTERNAL = re.compile(r"_objective|Tag|literal\[|list\[|function-|Value error|Request\b|Extra inputs|Decimal")


@pytest.fixture(scope="module")
def api(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An API alone. Requests that are refused need no other process."""
    home: Path = tmp_path_factory.mktemp("home")
    database_url = make_database_url("sqlite", home)
    settings = Settings(timetuner_home=home, database_url=database_url, broker_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        yield client


NO_LIST = "Input should be 'default', 'uniform', 'quadratic', 'log_snr' or 'edm'; or a valid list"


@pytest.mark.parametrize(
    ("path", "fields", "faults"),
    [
        (JOBS, {"num_step": 5}, {"num_steps": "Field required", "num_step": "did you mean 'num_steps'?"}),
        (JOBS, {"num_steps": 5, "tuner": {"total_iter": 3}}, {"tuner.total_iter": "did you mean 'total_iters'?"}),
        (
            JOBS,
            {"num_steps": 5, "tuner": {"objective": "x"}},
            {"tuner.objective": "Input should be one of 'end_to_end', "},
        ),
        (JOBS, {"num_steps": 5, "tuner": 5}, {"tuner": "Input should be an object"}),
        (JOBS, {"num_steps": 5, "evaluation": 5}, {"evaluation": "Input should be an object"}),
        (JOBS, {"num_steps": 5, "evaluation": {"num_sample": 5}}, {"evaluation.num_sample": "mean 'num_samples'?"}),
        (
            JOBS,
            {"num_steps": 5, "zzz": 1},
            {"zzz": "there is no field 'zzz'; accepted: call, clipping, eta, evaluation"},
        ),
        (JOBS, {"num_steps": 5, "timesteps": "x"}, {"timesteps": NO_LIST}),
        (JOBS, {"num_steps": 5, "timesteps": [1, "x"]}, {"timesteps.1": "Input should be a valid number"}),
        (JOBS, {"num_steps": 5, "sampler": "ddm"}, {"sampler": "sampler is 'ddm'; accepted: ddim"}),
        (JOBS, {"num_steps": 5, "eta": True}, {"eta": "Input should be a number"}),
        (SAMPLES, {"num_steps": 5, "class_labels": [1, "x"]}, {"class_labels.1": "Input should be a valid integer"}),
        ("/v1/models", {"bultin": "digits8"}, {"builtin": "Field required", "bultin": "did you mean 'builtin'?"}),
    ],
)
def test_a_fault_names_the_field_as_it_was_sent(
    api: TestClient, path: str, fields: dict[str, Any], faults: dict[str, str]
) -> None:
    body = fields if path == "/v1/models" else {"model": "mdl_1", **fields}
    answer = api.post(path, json=body)
    assert answer.status_code == 422
    problem = answer.json()
    found = {".".join(map(str, error["loc"][1:])): error["msg"] for error in problem["errors"]}
    assert found.keys() == faults.keys()
    for field, message in faults.items():
        assert message in found[field]
        assert f"body.{field}: {found[field]}" in problem["detail"]
    assert not INTERNAL.search(problem["detail"])


def test_a_query_field_and_broken_json_are_explained(api: TestClient) -> None:
    problem = api.get("/v1/schedules?stat=accepted").json()
    assert problem["detail"] == "query.stat: there is no field 'stat'; did you mean 'status'?"
    problem = api.post(JOBS, content=b'{"a":', headers={"Content-Type": "application/json"}).json()
    assert problem["detail"] == "body: this is no JSON (Expecting value, at character 5)"


@pytest.mark.parametrize(
    ("method", "path", "status", "detail"),
    [
        ("GET", "/v1/model", 404, "there is nothing at '/v1/model'; did you mean '/v1/models'?"),
        ("GET", "/nope", 404, "there is nothing at '/nope'; accepted: the paths that /docs lists"),
        ("DELETE", "/v1/models", 405, "DELETE is not possible at '/v1/models'; accepted: GET, POST"),
        ("GET", "/v1/models/x", 404, "no model 'x'; accepted: an id that GET /v1/models lists"),
        ("GET", f"{JOBS}/x", 404, "no tuning job 'x'; accepted: an id that GET /v1/tuning-jobs lists"),
        ("GET", "/v1/schedules/x", 404, "no schedule 'x'; accepted: an id that GET /v1/schedules lists"),
        ("GET", f"{SAMPLES}/x", 404, "no sampling job 'x'; accepted: an id that POST /v1/samples gave"),
        ("DELETE", "/v1/models/m/aliases/x", 404, "no alias 'x' of model 'm'; accepted: one that GET /v1/models/m/al"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(
    api: TestClient, method: str, path: str, status: int, detail: str
) -> None:
    problem = api.request(method, path).json()
    assert (problem["status"], problem["detail"][: len(detail)]) == (status, detail)


def test_a_models_name_in_place_of_its_id_is_answered_with_the_id(api: TestClient) -> None:
    model = api.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
    problem = api.post(JOBS, json={"model": "mixture-ring", "num_steps": 2}).json()
    accepted = f"accepted: an id; that of the newest model of this name is {model!r}"
    assert problem["detail"] == f"no model 'mixture-ring'; {accepted}"


def test_content_that_is_registered_already_is_not_given_another_name(api: TestClient) -> None:
    model = api.post("/v1/models", json={"builtin": "mixture-gratings", "name": "stripes"}).json()
    assert api.post("/v1/models", json={"builtin": "mixture-gratings"}).json() == model
    assert api.post("/v1/models", json={"builtin": "mixture-gratings", "name": "stripes"}).status_code == 200
    answer = api.post("/v1/models", json={"builtin": "mixture-gratings", "name": "mine"})
    assert answer.status_code == 409
    assert answer.json()["errors"][0]["loc"] == ["body", "name"]
    said = f"name is 'mine', but this content is model {model['id']!r}, named 'stripes'; accepted: no name, or that one"
    assert answer.json()["detail"].startswith(said)
    digits = api.post("/v1/models", json={"builtin": "digits8"}).json()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(BUNDLED / "digits8", arcname=".")
    files = {"archive": ("model.tar.gz", buffer.getvalue())}
    assert api.post("/v1/models", files=files).json() == {**digits, "ignored_files": ["README.md"]}
    assert api.post("/v1/models", files=files, data={"name": "my-digits"}).status_code == 409


def test_a_sampler_whose_package_cannot_be_loaded_now_is_tried_again_later(
    api: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine is no fault of the request: 422 would tell its sender never to send it again."""
    install(tmp_path, "own_midpoint", MIDPOINT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sampler_facts, "LOAD_SECONDS", 0.001)
    sampler_facts._installed_samplers.cache_clear()
    try:
        answer = api.post(JOBS, json={"model": "mdl_1", "num_steps": 5, "sampler": "own_midpoint"})
    finally:
        sampler_facts._installed_samplers.cache_clear()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
    assert "the samplers of installed packages cannot be loaded now" in answer.json()["detail"]
