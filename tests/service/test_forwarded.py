"""Senders of requests, as trusted proxies tell them in one of three headers."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.access.forwarded import ForwardedMiddleware
from service.app import create_app
from service.shared.settings import Settings
from tests.service.problems import assert_problem

TRUSTED = "127.0.0.1, 10.0.0.0/8, fd00::1"
PROXY, STRANGER = "127.0.0.1", "192.0.2.99"


def seen(peer: str | None, *headers: tuple[str, str], trusted: str = TRUSTED) -> tuple[str | None, str]:
    """The client's address and the scheme that the application is told."""
    found: list[tuple[str | None, str]] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        found.append((scope["client"] and scope["client"][0], scope["scheme"]))

    async def nothing(*_: Any) -> Any:
        raise AssertionError("not reached")

    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    client = None if peer is None else (peer, 1)
    scope: Any = {"type": "http", "scheme": "http", "client": client, "headers": raw}
    asyncio.run(ForwardedMiddleware(app, trusted)(scope, nothing, nothing))
    return found[0]


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (("X-Forwarded-For", "203.0.113.7"), "203.0.113.7"),
        (("X-Real-IP", "203.0.113.7"), "203.0.113.7"),
        (("X-Real-IP", "2001:db8::7"), "2001:db8::7"),
        (("X-Real-IP", "[2001:db8::7]:4711"), "2001:db8::7"),
        (("Forwarded", "for=203.0.113.7"), "203.0.113.7"),
        (("Forwarded", "For=203.0.113.7;By=10.0.0.1"), "203.0.113.7"),
        (("Forwarded", 'for="203.0.113.7:4711"'), "203.0.113.7"),
        (("Forwarded", 'for="[2001:db8:cafe::17]:4711"'), "2001:db8:cafe::17"),
        (("Forwarded", 'for="[2001:db8:cafe::17]"'), "2001:db8:cafe::17"),
        (("Forwarded", r'host="a\"b, for=127.0.0.1";for=203.0.113.7'), "203.0.113.7"),
        # Proxies add themselves at the end, so that what a client wrote comes first. Trusted ones are passed over.
        (("Forwarded", "for=127.0.0.1, for=203.0.113.7, for=10.1.2.3"), "203.0.113.7"),
        (("Forwarded", 'for=203.0.113.7;proto=http , for="[fd00::1]:80"'), "203.0.113.7"),
        (("Forwarded", "for=10.0.0.2, for=10.0.0.3"), "10.0.0.2"),
        (("Forwarded", "for=203.0.113.7;;"), "203.0.113.7"),
        # A client that nobody names is not this machine.
        (("Forwarded", "for=unknown"), "unknown"),
        (("Forwarded", "for=_hidden"), "_hidden"),
        (("Forwarded", 'for="what is this"'), "unknown"),
        (("Forwarded", "for=127.0.0.1, nonsense"), "unknown"),
        (("Forwarded", 'for=127.0.0.1, for="203.0.113.7'), "unknown"),
        (("X-Real-IP", "a, b"), "unknown"),
        # A long and wrong value is read in one pass.
        (("Forwarded", '"\\' * 30_000), "unknown"),
        (("Forwarded", "; " * 30_000 + "!"), "unknown"),
        # These name no client.
        (("Forwarded", "proto=https"), PROXY),
        (("Forwarded", ""), PROXY),
    ],
)
def test_a_trusted_proxy_says_who_asks_and_others_do_not(header: tuple[str, str], client: str) -> None:
    assert seen(PROXY, header)[0] == client
    assert seen(STRANGER, header)[0] == STRANGER
    assert seen(None, header)[0] is None


def test_several_headers_of_a_name_are_one_list() -> None:
    headers = [("Forwarded", "for=127.0.0.1"), ("Forwarded", "for=203.0.113.7"), ("Forwarded", "for=10.0.0.1")]
    assert seen(PROXY, *headers)[0] == "203.0.113.7"


def test_where_every_peer_is_trusted_the_first_hop_is_the_client() -> None:
    assert seen(STRANGER, ("Forwarded", "for=203.0.113.7, for=198.51.100.1"), trusted="*")[0] == "203.0.113.7"


HERE, A, B = "127.0.0.1", "203.0.113.7", "198.51.100.1"


@pytest.mark.parametrize(
    ("x_forwarded_for", "forwarded", "x_real_ip", "client"),
    [
        (A, B, B, A),
        (None, A, B, A),
        (None, None, A, A),
        # No header that a client sends through a proxy makes the request one of this machine.
        (HERE, A, None, A),
        (A, HERE, HERE, A),
        (HERE, HERE, A, A),
        (None, HERE, A, A),
        (HERE, HERE, HERE, HERE),
    ],
)
def test_of_headers_that_contradict_each_other_one_wins(
    x_forwarded_for: str | None, forwarded: str | None, x_real_ip: str | None, client: str
) -> None:
    given = [("X-Forwarded-For", x_forwarded_for), ("X-Real-IP", x_real_ip)]
    given.append(("Forwarded", None if forwarded is None else f"for={forwarded}"))
    assert seen(PROXY, *[(name, value) for name, value in given if value is not None])[0] == client


def test_the_scheme_is_that_of_the_client_and_the_older_header_wins() -> None:
    forwarded = ("Forwarded", "for=203.0.113.7;proto=https, for=10.0.0.1;proto=http")
    assert seen(PROXY, forwarded) == ("203.0.113.7", "https")
    assert seen(PROXY, forwarded, ("X-Forwarded-Proto", "http")) == ("203.0.113.7", "http")
    assert seen(STRANGER, forwarded) == (STRANGER, "http")
    assert seen(PROXY, ("Forwarded", "for=203.0.113.7;proto=gopher")) == ("203.0.113.7", "http")


def test_an_api_without_keys_serves_nobody_whom_a_proxy_here_names(database_url: str, tmp_path: Path) -> None:
    settings: Any = {"timetuner_home": tmp_path, "database_url": database_url, "broker_url": "redis://127.0.0.1:1/0"}
    with TestClient(create_app(Settings(**settings)), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        assert client.get("/v1/models").status_code == 200
        for name, value in (("Forwarded", "for=203.0.113.7"), ("X-Real-IP", "203.0.113.7")):
            answer = client.get("/v1/models", headers={name: value})
            assert_problem(answer, 403, accepted="203.0.113.7; accepted: this machine")
            assert client.get("/v1/models", headers={name: value.replace("203.0.113.7", "127.0.0.1")}).is_success
