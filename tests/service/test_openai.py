"""OpenAI's images API by OpenAI's own client, against the API on loopback and a worker in this process."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from service.app import create_app
from service.registry.database import Registry
from service.registry.tables import JobState, SampleJob
from service.shared.settings import Settings
from tests.conftest import MakeDatabaseUrl
from tests.pipelines import BY_NAME, plain, register
from tests.stack import Json, free_port, wait_until
from tests.worker.in_process import InProcess

pytestmark = pytest.mark.xdist_group("pipelines")

PROMPT = "a red square on a table"


class Service:
    """The API on a port, and a worker that serves while it is not paused."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.worker = InProcess(folder, registry, auth="off")
        self.registry = registry
        self.is_working = threading.Event()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/openai/v1", api_key="any", max_retries=0)
        config = uvicorn.Config(create_app(self.worker.settings), port=self.port, log_level="error")
        self._server = uvicorn.Server(config)
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._server.run), threading.Thread(target=self._work)]

    def _work(self) -> None:
        while not self._is_over.is_set():
            if self.is_working.wait(0.1):
                self.worker.serve()
                time.sleep(0.02)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self._server.started, "API")

    def stop(self) -> None:
        self._is_over.set()
        self._server.should_exit = True
        for thread in self._threads:
            thread.join()
        self.worker.close()

    def last_job(self) -> SampleJob:
        with self.registry.read() as session:
            return session.query(SampleJob).order_by(SampleJob.id.desc()).limit(1).one()


@pytest.fixture(scope="module")
def service(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("openai")
    registry = Registry(make_database_url("sqlite", folder))
    made = Service(folder, registry)
    made.start()
    yield made
    made.stop()
    registry.close()


@pytest.fixture(scope="module")
def pipeline(service: Service) -> Any:
    """The Stable Diffusion that is registered as sd15."""
    return register(service.worker, "sd15")[1]


@pytest.fixture(scope="module")
def digits(service: Service) -> Json:
    model: Json = httpx.post(f"{service.url}/v1/models", json={"builtin": "digits8"}).json()
    return model


@pytest.fixture
def working(service: Service) -> Iterator[None]:
    service.is_working.set()
    yield
    service.is_working.clear()


def pixels(image: Any) -> NDArray[np.float32]:
    """(C, H, W) in [-1, 1]."""
    opened = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
    return np.asarray(opened, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


@pytest.mark.usefixtures("working")
def test_image_k_is_that_of_a_plain_call_with_seed_plus_k(service: Service, pipeline: Any) -> None:
    answer = service.client.images.generate(
        model="sd15",
        prompt=PROMPT,
        n=2,
        size="16x16",
        response_format="b64_json",
        quality="auto",
        user="somebody",
        extra_body={"seed": 7, "num_steps": 3, "schedule": "none", "negative_prompt": "bad", "guidance_scale": 3},
    )
    assert (answer.size, answer.output_format, answer.seed, answer.schedule) == ("16x16", "png", 7, None)  # type: ignore[attr-defined]
    assert len(answer.data or []) == 2
    for k, image in enumerate(answer.data or []):
        expected = plain(
            BY_NAME["sd15"], pipeline, 7 + k, 3, prompt=PROMPT, negative_prompt="bad", guidance_scale=3.0
        ).numpy()
        assert np.abs(pixels(image) - expected.clip(-1, 1)).max() < 1 / 127


@pytest.mark.usefixtures("working", "pipeline")
def test_without_a_seed_images_differ_and_the_answer_tells_the_seed(service: Service) -> None:
    def generate(**extra: Any) -> Any:
        return service.client.images.generate(
            model="sd15", prompt=PROMPT, output_format="webp", extra_body={"num_steps": 2, **extra}
        )

    one, other = generate(), generate()
    assert one.seed != other.seed and one.data[0].b64_json != other.data[0].b64_json
    assert base64.b64decode(one.data[0].b64_json)[8:12] == b"WEBP"
    assert generate(seed=one.seed).data == one.data


@pytest.mark.usefixtures("working")
def test_a_network_is_sampled_by_its_id_with_an_empty_prompt(service: Service, digits: Json) -> None:
    extra = {"seed": 1, "num_steps": 2}
    answer = service.client.images.generate(model=digits["id"], prompt="", size="8x8", extra_body=extra)
    assert answer.size == "8x8"
    body = {"model": digits["id"], "num_steps": 2, "seed": 1}
    ours = httpx.post(f"{service.url}/v1/samples", json=body, headers={"Accept": "application/json"}).json()
    assert [image.b64_json for image in answer.data or []] == ours["images"]


def test_models_are_listed_and_found_by_name_and_id(service: Service, pipeline: Any, digits: Json) -> None:
    listed = {model.id: model for model in service.client.models.list()}
    assert {"sd15", "digits8"} <= set(listed)
    assert listed["digits8"].object == "model"
    assert service.client.models.retrieve("sd15") == listed["sd15"]
    assert service.client.models.retrieve(digits["id"]).created == listed["digits8"].created
    with pytest.raises(openai.NotFoundError) as refused:
        service.client.models.retrieve("someone/else")
    assert refused.value.code == "model_not_found"


REFUSED: dict[str, tuple[Json, str, str]] = {
    "a url": ({"response_format": "url"}, "response_format", "b64_json"),
    "a size that is none": ({"size": "big"}, "size", "pattern"),
    "a size that cannot be made": ({"size": "17x16"}, "size", "accepted: a multiple of 8"),
    "a network's other size": ({"model": "digits8", "prompt": "", "size": "16x16"}, "size", "accepted for this model"),
    "a network's prompt": ({"model": "digits8"}, "prompt", "takes no prompt; accepted: an empty one"),
    "a network's guidance": ({"model": "digits8", "prompt": "", "guidance_scale": 2}, "guidance_scale", "no pipeline"),
    "a network without steps": ({"model": "digits8", "prompt": ""}, "num_steps", "num_steps is missing"),
    "a quality": ({"quality": "hd"}, "quality", "auto"),
    "a style": ({"style": "natural"}, "style", "vivid"),
    "a transparent background": ({"background": "transparent"}, "background", "opaque"),
    "a stream": ({"stream": True}, "stream", "False"),
    "a field that nobody knows": ({"sead": 1}, "sead", "did you mean 'seed'"),
    "too many images": ({"n": 900}, "n", "n is 900"),
    "a schedule of nobody": ({"schedule": "sch_nope"}, "schedule", "no schedule"),
    "no prompt": ({"prompt": None}, "prompt", ""),
}


@pytest.mark.usefixtures("pipeline", "digits")
@pytest.mark.parametrize(("changes", "param", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_accepted_is_refused_by_name(service: Service, changes: Json, param: str, message: str) -> None:
    body = {"model": "sd15", "prompt": PROMPT} | changes
    with pytest.raises(openai.BadRequestError) as refused:
        service.client.post("/images/generations", body=body, cast_to=object)
    error = refused.value
    assert (error.param, error.type) == (param, "invalid_request_error"), error.body
    assert message in f"{error.body}", error.body
    assert PROMPT not in f"{error.body}"


def test_an_unknown_model_or_path_is_an_error_of_openais_form(service: Service) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        service.client.images.generate(model="dall-e-3", prompt=PROMPT)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    unknown = httpx.post(f"{service.url}/openai/v1/images/edits", json={}, headers={"Accept": "text/html"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["message"].startswith("there is nothing at '/openai/v1/images/edits'")
    assert unknown.headers["x-request-id"]
    wrong_type = httpx.post(f"{service.url}/openai/v1/images/generations", content=b"{}")
    assert (wrong_type.status_code, set(wrong_type.json())) == (400, {"error"})


@pytest.mark.usefixtures("pipeline")
def test_a_client_that_hangs_up_cancels_its_job(service: Service) -> None:
    with pytest.raises(openai.APITimeoutError):
        service.client.with_options(timeout=1.0).images.generate(model="sd15", prompt=PROMPT)
    wait_until(lambda: service.last_job().state == JobState.CANCELLED, "cancelled job")


@pytest.mark.usefixtures("pipeline")
def test_what_takes_too_long_is_503_and_only_a_request_with_a_seed_goes_on(service: Service) -> None:
    settings = service.worker.settings.model_copy(update={"max_wait_seconds": 0.2, "max_queued_jobs": 1})
    body = {"model": "sd15", "prompt": PROMPT}
    with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as api:
        for seed, state in ((None, JobState.CANCELLED), (5, JobState.QUEUED)):
            late = api.post("/openai/v1/images/generations", json=body | {"seed": seed})
            assert late.status_code == 503
            assert int(late.headers["retry-after"]) > 0
            assert late.json()["error"]["type"] == "server_error"
            assert service.last_job().state == state
        too_many = api.post("/openai/v1/images/generations", json=body)
        assert (too_many.status_code, too_many.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(too_many.headers["retry-after"]) > 0
        api.post(f"/v1/samples/{service.last_job().id}/cancel")


def test_keys_are_asked_for_in_openais_form(database_url: str, tmp_path: Path) -> None:
    settings: Any = {"timetuner_home": tmp_path, "database_url": database_url, "broker_url": "redis://127.0.0.1:1/0"}
    with TestClient(create_app(Settings(**settings, auth="on")), base_url="http://127.0.0.1") as api:
        for method, path in (("GET", "/openai/v1/models"), ("POST", "/openai/v1/images/generations")):
            refused = api.request(method, path, headers={"Authorization": "Bearer sk-wrong"})
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
