"""HTTP as clients that are slow, many, elsewhere, or in a browser meet it."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.http.protocol import HEADER_SECONDS
from tests.conftest import MakeDatabaseUrl
from tests.service.problems import assert_problem
from tests.stack import Json, Stack, wait_until

BODY_SECONDS = 2.0
ORIGIN = "https://pages.example"
WELL_FORMED = "me-1.2_3"
TUNING = {"num_steps": 2, "tuner": {"total_iters": 1, "population_size": 16}, "evaluation": {"num_samples": 16}}


@pytest.fixture(scope="module")
def api(make_database_url: MakeDatabaseUrl) -> Iterator[Stack]:
    """A whole deployment whose logs are in `logs`, whose bodies may not be slow, and which a web page may use."""
    with tempfile.TemporaryDirectory(prefix="timetuner-test-") as folder:
        stack = Stack(Path(folder), make_database_url("sqlite", Path(folder)))
        own = {"BODY_SECONDS": str(BODY_SECONDS), "CORS_ORIGINS": json.dumps([ORIGIN]), "LOG_LEVEL": "info"}
        stack.environment |= own
        stack.logs = stack.home / "logs"
        try:
            stack.start_all()
            stack.wait_until_ready()
            yield stack
        finally:
            stack.stop()


def connect(api: Stack) -> socket.socket:
    url = api.client.base_url
    return socket.create_connection((url.host, url.port), timeout=60)


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """The status of what is answered until the connection is closed; 0 for nothing; and all of it."""
    content = b""
    try:
        while piece := connection.recv(65_536):
            content += piece
    except ConnectionResetError:
        pass
    return int(content.split()[1]) if content else 0, content


def drip(connection: socket.socket, piece: bytes, seconds: float) -> None:
    """Send a piece now and then for so long, or until we are hung up on."""
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            connection.sendall(piece)
            time.sleep(0.2)
    except OSError:
        pass


# Slow clients


@pytest.mark.parametrize(
    ("head", "piece"),
    [(b"", b""), (b"GET / HT", b""), (b"GET / HTTP/1.1\r\n", b"X: x\r\n")],
    ids=["silence", "half a line", "a header now and then"],
)
def test_headers_that_do_not_come_are_not_waited_for(api: Stack, head: bytes, piece: bytes) -> None:
    with connect(api) as connection:
        connection.sendall(head)
        if piece:
            drip(connection, piece, HEADER_SECONDS + 2)
        status, content = answer(connection)
    assert status in (408, 0)  # 0: what we sent too late may have made the network drop the answer
    assert status == 0 or b"application/problem+json" in content


@pytest.mark.parametrize("piece", [b"", b"1\r\n \r\n"], ids=["silence", "a byte now and then"])
def test_a_body_that_does_not_come_is_not_waited_for(api: Stack, piece: bytes) -> None:
    head = b"POST /v1/tuning-jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with connect(api) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        began = time.monotonic()
        if piece:
            drip(connection, piece, BODY_SECONDS + 1)
        status, content = answer(connection)
        assert time.monotonic() - began < 60
    assert status == 408
    assert b"bytes per second" in content


def test_a_connection_is_not_kept_for_the_rest_of_a_refused_body(api: Stack) -> None:
    head = b"POST /v1/tuning-jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999999\r\n\r\n"
    with connect(api) as connection:
        connection.sendall(head)
        drip(connection, b"x" * 1000, 60)  # ends as soon as we are hung up on
        status, _ = answer(connection)
    assert status in (413, 0)


def test_many_slow_clients_do_not_keep_others_from_being_served(api: Stack) -> None:
    slow = [connect(api) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/samples HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        assert api.client.get("/v1/models").is_success
    finally:
        for connection in slow:
            connection.close()


def test_a_large_body_at_a_good_pace_is_read_to_its_end(api: Stack) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 3000
            time.sleep(0.2)

    answer = api.client.post("/v1/models", content=pieces(), headers={"Content-Type": "application/json"})
    assert_problem(answer, 422, "body")


# Request ids


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/v1/models/mdl_none", "/nope"])
def test_an_id_is_given_to_each_request_and_returned(api: Stack, path: str) -> None:
    first, second = (api.client.get(path).headers["x-request-id"] for _ in range(2))
    assert first.startswith("req_")
    assert first != second
    assert api.client.get(path, headers={"X-Request-Id": WELL_FORMED}).headers["x-request-id"] == WELL_FORMED


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a;b", "\x80"])
def test_an_id_that_is_not_well_formed_is_replaced(api: Stack, given: str) -> None:
    response = api.client.get("/healthz", headers=[(b"X-Request-Id", given.encode("latin-1"))])
    assert response.headers["x-request-id"].startswith("req_")


def test_a_problem_has_the_id(api: Stack) -> None:
    response = api.client.get("/v1/models/mdl_none", headers={"X-Request-Id": WELL_FORMED})
    assert assert_problem(response, 404)["request_id"] == WELL_FORMED


def test_jobs_and_the_workers_lines_about_them_have_the_id(api: Stack) -> None:
    model = api.register("mixture-ring")
    named = {"X-Request-Id": "the-tuning"}
    tuning = api.client.post("/v1/tuning-jobs", json={"model": model, **TUNING}, headers=named).json()
    assert tuning["request_id"] == "the-tuning"
    api.finished(tuning)
    named = {"X-Request-Id": "the-sampling", "Prefer": "respond-async"}
    body = {"model": model, "num_steps": 2, "num_images": 40}
    sampling = api.client.post("/v1/samples", json=body, headers=named).json()
    assert sampling["request_id"] == "the-sampling"
    api.finished(sampling, "samples")
    ends = wait_until(lambda: lines(api, "job ended") and lines(api, "jobs ended"), "lines of both")
    assert {"the-sampling"} == {request_id for line in ends for request_id in line["request_ids"]}
    (line,) = lines(api, "job ended")
    assert (line["job_id"], line["request_id"], line["state"]) == (tuning["id"], "the-tuning", "succeeded")


def test_each_request_is_logged_as_json_with_its_id(api: Stack) -> None:
    api.client.get("/v1/schedules", headers={"X-Request-Id": "logged"})
    line = wait_until(lambda: [line for line in lines(api, "request") if line["request_id"] == "logged"], "line")[0]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/schedules", 200)
    assert line["level"] == "info"
    assert line["seconds"] > 0
    assert "timestamp" in line


def lines(api: Stack, event: str) -> list[Json]:
    """The records logged of this kind; all that is logged must be JSON."""
    logged = [json.loads(line) for line in (api.home / "logs").read_text().splitlines() if line.startswith("{")]
    return [line for line in logged if line["event"] == event]


def test_what_fails_unforeseen_is_told_to_the_log_alone(api: Stack) -> None:
    table = "schedules"
    with api.registry.engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO hidden")
    try:
        response = api.client.get("/v1/schedules", headers={"X-Request-Id": "unforeseen"})
    finally:
        with api.registry.engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE hidden RENAME TO {table}")
    assert_problem(response, 500, accepted="an unexpected error")
    assert response.json()["request_id"] == response.headers["x-request-id"] == "unforeseen"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sqlite" not in response.text.lower()
    (line,) = wait_until(lambda: lines(api, "request failed"), "line")
    assert (line["request_id"], line["method"], line["path"]) == ("unforeseen", "GET", "/v1/schedules")
    assert "no such table" in line["exception"]


def test_a_terminal_gets_lines_for_people() -> None:
    code = (
        "import logging; from service.shared.logs import *; "
        "start_logging('info'); logging.getLogger('service.x').info('hey')"
    )
    leader, follower = os.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=follower, check=True)
    shown = os.read(leader, 10_000).decode()
    assert "hey" in shown
    assert not shown.startswith("{")


# Browsers


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/none", "/openapi.json", "/healthz", "/docs", "/nope"])
def test_browsers_are_told_to_guess_and_frame_nothing(api: Stack, path: str) -> None:
    headers = api.client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert ("script-src" in headers["content-security-policy"]) == (path == "/docs")
    assert "server" not in headers


def test_states_are_not_kept_by_caches_and_images_only_as_long_as_they_hold(api: Stack) -> None:
    assert api.client.get("/v1/models").headers["cache-control"] == "no-store"
    body = {"model": api.register("mixture-ring"), "num_steps": 2}
    images = api.client.post("/v1/samples", json=body)
    assert images.headers["cache-control"] == "private, no-cache"
    content = images.headers["content-location"]
    again = api.client.get(content, headers={"If-None-Match": images.headers["etag"]})
    assert again.status_code == 304


def test_pages_of_the_origins_that_were_named_may_use_the_api(api: Stack) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-request-id",
    }
    preflight = api.client.options("/v1/samples", headers=asked)
    assert preflight.is_success
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    answer = api.client.get("/v1/models", headers={"Origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_no_other_page_may(api: Stack) -> None:
    answer = api.client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert api.client.options("/v1/samples", headers=asked).status_code >= 400


def test_none_may_by_default(client: httpx.Client) -> None:
    answer = client.get("/v1/models", headers={"Origin": ORIGIN})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_client_that_hangs_up_in_the_middle_of_an_upload_leaves_nothing_and_no_alarm(api: Stack) -> None:
    files, failures = api.files(), lines(api, "request failed")
    with connect(api) as connection:
        head = b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: hung-up\r\nContent-Length: 100000\r\n"
        connection.sendall(head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n" + b"x" * 1000)
    wait_until(lambda: [line for line in lines(api, "request") if line["request_id"] == "hung-up"], "line")
    assert lines(api, "request failed") == failures
    assert api.files() == files
