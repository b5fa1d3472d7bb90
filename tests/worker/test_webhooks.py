"""Webhooks: told once a job is over, signed, again if nobody heard, and never where they must not go."""

import base64
import hashlib
import hmac
import ipaddress
import json
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpcore
import pytest
from sqlalchemy import select

from service.registry.tables import Webhook
from service.shared.addresses import is_allowed
from service.shared.settings import Settings
from tests.conftest import ENGINES, MakeDatabaseUrl
from tests.service.problems import assert_problem
from tests.stack import Json, Stack, wait_until
from worker import webhooks
from worker.webhooks import ForbiddenAddressError, post

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
TUNING: Json = {"num_steps": 2, "tuner": {"total_iters": 1, "population_size": 16}, "evaluation": {"num_samples": 16}}
LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]


class Receiver:
    """An HTTP server that answers with these statuses, the last one for ever, and remembers what it was sent."""

    def __init__(self) -> None:
        self.statuses = [200]
        self.headers: dict[str, str] = {}
        self.heard: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.heard.append(({name.lower(): value for name, value in self.headers.items()}, body))
                statuses = receiver.statuses
                self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook?x=1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module", params=ENGINES)
def hooked(request: pytest.FixtureRequest, make_database_url: MakeDatabaseUrl) -> Iterator[Stack]:
    """A deployment that signs webhooks, and may send them to this machine."""
    with tempfile.TemporaryDirectory(prefix="timetuner-test-") as folder:
        stack = Stack(Path(folder), make_database_url(request.param, Path(folder)))
        stack.environment |= {"WEBHOOK_SECRET": SECRET, "WEBHOOK_NETWORKS": '["127.0.0.0/8"]'}
        stack.environment |= {"WEBHOOK_RETRY_SECONDS": "0.5", "WEBHOOK_ATTEMPTS": "3"}
        try:
            stack.start_all()
            stack.wait_until_ready()
            yield stack
        finally:
            stack.stop()


def sample(stack: Stack, url: str, seed: int = 0, **request: Any) -> Json:
    """A sampling job that was accepted."""
    body = {"model": stack.register("mixture-ring"), "num_steps": 2, "seed": seed, "webhook_url": url, **request}
    response = stack.client.post("/v1/samples", json=body, headers={"Prefer": "respond-async"})
    assert response.status_code == 202, response.text
    job: Json = response.json()
    return job


def check_signature(headers: dict[str, str], body: bytes) -> None:
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 300


def outcome(stack: Stack, job: Json) -> Webhook | None:
    """The webhook of a sampling job, once no more attempts will be made."""
    with stack.registry.read() as session:
        row: Webhook = session.scalars(select(Webhook).filter_by(sample_job_id=job["id"])).one()
    return row if row.next_attempt_at is None else None


@pytest.mark.parametrize("num_images", [1, 40], ids=["whole", "split"])
def test_the_end_of_a_sampling_job_is_told_once_and_signed(hooked: Stack, receiver: Receiver, num_images: int) -> None:
    job = sample(hooked, receiver.url, seed=100, num_images=num_images)
    row = wait_until(lambda: outcome(hooked, job), "delivery")
    assert (row.error, row.attempt) == (None, 1)
    assert row.delivered_at is not None
    ((headers, body),) = receiver.heard
    check_signature(headers, body)
    content = json.loads(body)
    assert content["type"] == "sampling.succeeded"
    assert content["data"]["id"] == job["id"]
    assert content["data"]["request_id"] == job["request_id"]
    assert hooked.client.get(content["data"]["url"]).json()["state"] == "succeeded"


def test_the_ends_of_tuning_jobs_are_told_whatever_they_are(hooked: Stack, receiver: Receiver) -> None:
    model = hooked.register("mixture-ring")
    fine = hooked.submit(model, webhook_url=receiver.url, **TUNING)
    broken = hooked.submit(
        model, webhook_url=receiver.url, sampler="own_broken", num_steps=2, tuner={"objective": "grid"}
    )
    wait_until(lambda: len(receiver.heard) == 2, "two webhooks")
    told = {content["data"]["id"]: content["type"] for content in (json.loads(body) for _, body in receiver.heard)}
    assert told == {fine["id"]: "tuning.succeeded", broken["id"]: "tuning.failed"}


def test_what_was_not_heard_is_told_again_under_the_same_id(hooked: Stack, receiver: Receiver) -> None:
    receiver.statuses = [500, 302, 200]
    receiver.headers = {"Location": "/elsewhere"}
    job = sample(hooked, receiver.url, seed=200)
    row = wait_until(lambda: outcome(hooked, job), "delivery")
    assert (row.error, row.attempt) == (None, 3)
    assert len({headers["webhook-id"] for headers, _ in receiver.heard}) == 1
    assert len(receiver.heard) == 3  # nobody went where the redirect led
    for headers, body in receiver.heard:
        check_signature(headers, body)


@pytest.mark.parametrize(("status", "attempts"), [(500, 3), (410, 1)])
def test_attempts_end(hooked: Stack, receiver: Receiver, status: int, attempts: int) -> None:
    receiver.statuses = [status]
    job = sample(hooked, receiver.url, seed=300 + status)
    row = wait_until(lambda: outcome(hooked, job), "end of attempts")
    assert (row.error, row.attempt, row.delivered_at) == (f"answered {status}", attempts, None)
    assert len(receiver.heard) == attempts


def test_a_killed_sender_loses_nothing(hooked: Stack, receiver: Receiver) -> None:
    hooked.end("dispatcher", number=signal.SIGKILL)
    job = sample(hooked, receiver.url, seed=400)
    hooked.finished(job, "samples")
    assert receiver.heard == []
    hooked.start("dispatcher")
    wait_until(lambda: outcome(hooked, job), "delivery")
    assert len(receiver.heard) == 1


def test_a_repeated_request_is_told_too(hooked: Stack, receiver: Receiver) -> None:
    first = sample(hooked, receiver.url, seed=500)
    wait_until(lambda: outcome(hooked, first), "delivery")
    again = sample(hooked, receiver.url, seed=500)
    wait_until(lambda: outcome(hooked, again), "delivery")
    assert [json.loads(body)["data"]["id"] for _, body in receiver.heard] == [first["id"], again["id"]]


BAD_URLS = [
    "",
    "example.org/hook",
    "ftp://example.org",
    "file:///etc/passwd",
    "http://",
    "http://user:password@example.org",
    "http://example.org/#x",
    "http://example.org:99999",
    "http://exa mple.org",
    "http://example.org/\n",
    "https://example.org/" + "x" * 2000,
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1",
    "http://[::1]:8000",
    "http://[::ffff:10.0.0.1]",
    7,
]


@pytest.mark.parametrize("path", ["/v1/samples", "/v1/tuning-jobs"])
@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_is_none_for_webhooks_is_refused(hooked: Stack, path: str, url: Any) -> None:
    body = {"model": hooked.register("mixture-ring"), "num_steps": 2, "webhook_url": url}
    assert_problem(hooked.client.post(path, json=body), 422, "webhook_url", "accepted" if url != 7 else None)


def test_without_a_secret_there_are_none(stack: Stack) -> None:
    body = {"model": stack.register("mixture-ring"), "num_steps": 2, "webhook_url": "https://example.org"}
    assert_problem(stack.client.post("/v1/samples", json=body), 422, "webhook_url", "WEBHOOK_SECRET")


# Addresses that are allowed


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)
def test_addresses_that_are_not_public_are_refused_unless_they_are_allowed(address: str) -> None:
    parsed = ipaddress.ip_address(address)
    assert not is_allowed(parsed, [])
    assert is_allowed(parsed, [ipaddress.ip_network(parsed)]) or "ffff:" in address


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(ipaddress.ip_address(address), [])


def settings(**changes: Any) -> Settings:
    return Settings(webhook_secret=SECRET, **changes)


def test_a_name_of_an_address_that_must_not_be_reached_is_not_called(receiver: Receiver) -> None:
    url = receiver.url.replace("127.0.0.1", "localhost")
    with pytest.raises(ForbiddenAddressError, match="accepted: names of public addresses"):
        post(url, "whk_1", b"{}", settings())
    assert receiver.heard == []


def test_a_name_is_looked_up_once_and_all_its_addresses_are_checked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(receiver.url.rpartition(":")[2].partition("/")[0])
    url = f"http://rebinding.example:{port}/"
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    resolve = socket.getaddrinfo

    def looked_up(host: str, *args: Any, **options: Any) -> Any:
        if host != "rebinding.example":
            return resolve(host, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(webhooks.socket, "getaddrinfo", looked_up)
    assert post(url, "whk_1", b"{}", settings(webhook_networks=LOOPBACK)) == 200
    assert len(answers) == 1  # the second answer was never asked for
    assert receiver.heard[0][0]["host"] == f"rebinding.example:{port}"
    answers[:] = [["127.0.0.1", "10.0.0.1"]]
    with pytest.raises(ForbiddenAddressError, match=r"10\.0\.0\.1"):
        post(url, "whk_1", b"{}", settings(webhook_networks=LOOPBACK))
    assert len(receiver.heard) == 1


def test_an_answer_that_is_dripped_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "ATTEMPT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n")
                    for _ in range(600):
                        connection.sendall(b"x: y\r\n")
                        time.sleep(0.1)
                except OSError:
                    pass

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(httpcore.TimeoutException):
            post(f"http://127.0.0.1:{server.getsockname()[1]}/", "w", b"{}", settings(webhook_networks=LOOPBACK))
        assert time.monotonic() - began < 30
