"""The client when answers fail to come, with a real server that fails as it is told to."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.client import (
    AsyncTimeTuner,
    Model,
    ServerError,
    TimeTuner,
    TooManyRequestsError,
    UnexpectedAnswerError,
    UnreachableError,
)
from service.client.calls import Call, delete_model, get_model, register_model
from tests.stack import free_port

MODEL = {
    "id": "mdl_1",
    "name": "digits",
    "content_hash": "0",
    "created_at": "2026-01-01T00:00:00Z",
    "spec": {
        "sample_shape": [1, 8, 8],
        "image_shape": [1, 8, 8],
        "model_type": "noise",
        "T": 1.0,
        "num_train_timesteps": 1000,
        "num_classes": 0,
        "null_class_label": None,
        "condition_shape": None,
        "guidance_types": ["uncond"],
        "num_parameters": 1,
        "has_uncond_condition": False,
        "has_conditions": False,
        "has_data": True,
        "of_a_newer_service": "is not looked at",
    },
}
Answer = int | tuple[int, dict[str, str]] | float | None  # a status, with headers; a wait; None: no answer
BUSY = (429, {"Retry-After": "1"})


@dataclass
class Server:
    """Gives its answers in turn, and remembers what it was asked."""

    url: str
    answers: list[Answer]
    keys: list[str | None] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            server.keys.append(self.headers["Idempotency-Key"])
            server.bodies.append(self._body())
            server.times.append(time.monotonic())
            answer = server.answers.pop(0)
            if isinstance(answer, float):
                time.sleep(answer)
                answer = 201
            if answer is None:
                self.close_connection = True
                return
            status, headers = (answer, {}) if isinstance(answer, int) else answer
            content = json.dumps(MODEL).encode() if status in (200, 201) else b"<html>of a proxy</html>"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            if "Content-Length" in self.headers:
                return self.rfile.read(int(self.headers["Content-Length"]))
            body = b""
            while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                body += self.rfile.read(size)
                self.rfile.readline()
            return body

        do_GET = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server = Server(f"http://127.0.0.1:{http.server_port}", list(answers))
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        http.shutdown()
        thread.join()


def send(url: str, call: Call[Any], kind: str, max_attempts: int = 4, timeout: float = 60) -> Any:
    if kind == "sync":
        with TimeTuner(url, max_attempts=max_attempts, timeout=timeout) as client:
            return client.send(call)

    async def ask() -> Any:
        async with AsyncTimeTuner(url, max_attempts=max_attempts, timeout=timeout) as client:
            return await client.send(call)

    return asyncio.run(ask())


kinds = pytest.mark.parametrize("kind", ["sync", "async"])


@kinds
@pytest.mark.parametrize("failure", [503, 502, 504, BUSY, None])
def test_a_request_is_sent_again_with_the_same_key(kind: str, failure: Answer) -> None:
    with serving(failure, failure, 201, 201) as server:
        model = send(server.url, register_model({"builtin": "digits8"}), kind)
        assert isinstance(model, Model)
        assert model.id == "mdl_1"
        send(server.url, register_model({"builtin": "digits8"}), kind)
        *same, other = server.keys
    assert len(same) == 3
    assert same[0] and set(same) == {same[0]}
    assert other and other != same[0]


@kinds
def test_a_file_is_sent_again_whole(kind: str, tmp_path: Path) -> None:
    archive = tmp_path / "model.zip"
    archive.write_bytes(b"0123456789" * 100_000)
    with serving(503, 201) as server:
        send(server.url, register_model({"archive": archive, "name": "n"}), kind)
        assert all(archive.read_bytes() in body for body in server.bodies)
        assert len(server.bodies) == 2


@kinds
def test_a_model_may_take_longer_than_other_requests(kind: str, tmp_path: Path) -> None:
    (archive := tmp_path / "model.zip").write_bytes(b"0123456789")
    with serving(3.0) as server:
        send(server.url, register_model({"archive": archive, "name": "n"}), kind, max_attempts=1, timeout=1)
    with serving(3.0) as server, pytest.raises(UnreachableError, match=r"timed out|Timeout"):
        send(server.url, get_model("mdl_1"), kind, max_attempts=1, timeout=1)


@kinds
def test_a_busy_service_is_asked_again_when_it_says(kind: str) -> None:
    with serving(BUSY, 200) as server:
        send(server.url, get_model("mdl_1"), kind)
        assert server.times[1] - server.times[0] >= 1


@kinds
def test_a_service_that_wants_more_time_than_anyone_waits_is_not_asked_again(kind: str) -> None:
    with serving((429, {"Retry-After": "3600"})) as server, pytest.raises(TooManyRequestsError) as caught:
        send(server.url, get_model("mdl_1"), kind)
    assert caught.value.retry_after == 3600


@kinds
def test_after_the_last_attempt_the_error_is_told_in_one_line(kind: str) -> None:
    with serving(503, 503) as server, pytest.raises(ServerError) as caught:
        send(server.url, get_model("mdl_1"), kind, max_attempts=2)
    assert str(caught.value) == "503 Service Unavailable: <html>of a proxy</html>"


@kinds
@pytest.mark.parametrize("status", [400, 404, 409, 422, 500])
def test_an_error_that_does_not_pass_is_not_tried_again(kind: str, status: int) -> None:
    with serving(status) as server:
        with pytest.raises(Exception, match=str(status)):
            send(server.url, delete_model("mdl_1"), kind)
        assert len(server.keys) == 1


@kinds
def test_an_answer_of_another_program_is_told_as_such(kind: str) -> None:
    with (
        serving(203) as server,
        pytest.raises(UnexpectedAnswerError, match=r"203 .* is no answer of a TimeTuner service"),
    ):
        send(server.url, get_model("mdl_1"), kind)


@kinds
def test_a_service_that_is_not_there_is_named(kind: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UnreachableError, match=f"the service at {url} cannot be reached"):
        send(url, get_model("mdl_1"), kind, max_attempts=2)
