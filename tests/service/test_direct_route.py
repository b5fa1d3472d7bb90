"""`POST /v1/samples` reads most requests without FastAPI's dependencies: it must answer all as if it did not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Response
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.database import Registry
from service.registry.tables import SampleJob
from service.samples import direct_route, endpoints
from service.samples.submitting import Submission
from service.shared.settings import Settings

TYPE = {"Content-Type": "application/json"}
BODY = {"model": "mdl_x", "num_steps": 2, "guidance_scale": 1.25, "timesteps": [999, 500.5, 0], "call": {"a": [1, "b"]}}
# Headers, body, and whether it is read directly.
REQUESTS: dict[str, tuple[dict[str, str], bytes, bool]] = {
    "plain": (TYPE, json.dumps(BODY).encode(), True),
    "all headers": (
        {"content-type": "Application/JSON; charset=x", "Accept": "image/png;q=0", "PREFER": "wait=3"},
        json.dumps(BODY | {"class_labels": [1, 2]}).encode(),
        True,
    ),
    "empty headers": (TYPE | {"Accept": "", "Prefer": ""}, json.dumps(BODY).encode(), True),
    "a key": (TYPE | {"Idempotency-Key": "k" * 200}, json.dumps(BODY).encode(), True),
    "numbers as texts": (TYPE, b'{"model": "m", "num_steps": "2", "eta": "0.5", "previews": "yes"}', True),
    "UTF-16": (TYPE, json.dumps(BODY).encode("utf-16"), True),
    "half a character": (TYPE, b'{"model": "m", "num_steps": 2, "prompt": "\\ud800"}', False),
    "a key that is too long": (TYPE | {"Idempotency-Key": "k" * 201}, json.dumps(BODY).encode(), False),
    "an empty key": (TYPE | {"Idempotency-Key": ""}, json.dumps(BODY).encode(), False),
    "another type": ({"Content-Type": "text/plain"}, json.dumps(BODY).encode(), False),
    "no type": ({}, json.dumps(BODY).encode(), False),
    "no body": (TYPE, b"", False),
    "no JSON": (TYPE, b'{"model": ', False),
    "no object": (TYPE, b"null", False),
    "not a number": (TYPE, b'{"model": "m", "num_steps": 2, "guidance_scale": NaN}', False),
    "too exact": (TYPE, b'{"model": "m", "num_steps": 2, "guidance_scale": 1.0000001}', False),
    "a field twice": (TYPE, b'{"model": "m", "num_steps": 2, "num_steps": 3}', False),
    "an unknown field": (TYPE, json.dumps(BODY | {"num_step": 1}).encode(), False),
    "deep": (TYPE, b"[" * 100_000, False),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An API that answers with what `sample` asks of the rest of the service."""
    home: Path = tmp_path_factory.mktemp("home")
    settings = Settings(timetuner_home=home, broker_url="redis://127.0.0.1:1/0")
    registry = Registry(settings.database_url)
    registry.upgrade()
    registry.close()

    async def serve(
        _state: Any, _samples: Any, submission: Submission, seconds: float | None, _answer: Any, waiting: Any
    ) -> tuple[SampleJob, Response]:
        once = submission.once and [submission.once.given, submission.once.key, submission.once.request_hash]
        asked = [repr(submission.request), submission.accept, submission.caller.owner, once, seconds, waiting is None]
        return SampleJob(), Response(json.dumps(asked))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoints, "serve", serve)
        with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
            yield client


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_read_as_fastapi_reads_it(client: TestClient, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    headers, body, is_direct = REQUESTS[name]
    read, found = direct_route.read_arguments, []

    async def noted(request: Any) -> Any:
        found.append(await read(request))
        return found[-1]

    async def nothing(_request: Any) -> None:
        return None

    def ask(reads: Any) -> tuple[int, str]:
        monkeypatch.setattr(direct_route, "read_arguments", reads)
        answer = client.post("/v1/samples", content=body, headers={**headers, "X-Request-Id": "req"})
        return answer.status_code, answer.text

    directly, by_fastapi = ask(noted), ask(nothing)
    assert directly == by_fastapi
    assert [one is not None for one in found] == [is_direct]
    assert (directly[0] == 200) == is_direct
