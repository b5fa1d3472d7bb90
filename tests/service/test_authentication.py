"""Keys as their users and makers meet them: revoking, limits, whose jobs are whose, and no key on this machine."""

import asyncio
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from service.access.limits import RateLimits
from service.access.local import is_loopback
from service.http.errors import KeyLimitError
from service.registry.database import Registry
from service.registry.keys import Scope, revoke_key
from service.registry.tables import ApiKey, AuditEntry
from tests.cli.conftest import Run, timetuner  # noqa: F401
from tests.conftest import MakeDatabaseUrl
from tests.keys import NewUser, User, keys
from tests.service.problems import assert_problem
from tests.stack import SMALLEST, Json, Stack, free_port, wait_until

NPY = {"Accept": "application/x-npy"}
ASYNC = {"Prefer": "respond-async"}
QUICK: Json = {"num_steps": 2, "tuner": {"objective": "grid"}, "evaluation": SMALLEST}


@pytest.fixture(scope="module")
def ring(stack: Stack) -> str:
    return stack.register("mixture-ring")


def entries(stack: Stack) -> int:
    with stack.registry.read() as session:
        return session.scalar(select(func.count()).select_from(AuditEntry)) or 0


def test_a_key_that_is_revoked_is_refused_within_seconds(stack: Stack, new_user: NewUser) -> None:
    user = new_user()
    assert user.client.get("/v1/models").status_code == 200
    with stack.registry.write() as session:
        revoke_key(session, user.id)
    began = time.monotonic()
    wait_until(lambda: user.client.get("/v1/models").status_code == 401, "refusal")
    assert time.monotonic() - began < 10  # a second, and time for a busy machine
    assert_problem(user.client.get("/v1/models"), 401, accepted="revoked")


@pytest.mark.parametrize(("path", "has_key"), [("/v1/samples", False), ("/v1/models", False), ("/v1/models", True)])
def test_who_may_not_upload_is_told_so_before_it(
    stack: Stack, guarded: str, new_user: NewUser, path: str, has_key: bool
) -> None:
    """The body never comes."""
    before = entries(stack)
    head = f"POST {path} HTTP/1.1\r\nHost: {guarded}\r\nContent-Length: 50000\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n"
    if has_key:
        head += f"Authorization: Bearer {new_user(Scope.TUNE).key}\r\n"
    url = httpx.URL(guarded)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(f"{head}\r\n".encode())
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 403 " if has_key else b"HTTP/1.1 401 ")
    if has_key:  # The entry is written after the answer, and the next tests count entries.
        wait_until(lambda: entries(stack) > before, "entry")


def test_when_a_key_was_last_used_is_noted(stack: Stack, new_user: NewUser) -> None:
    user = new_user()

    def last_used() -> object:
        with stack.registry.read() as session:
            return session.get_one(ApiKey, user.id).last_used_at

    forged = httpx.get(f"{user.client.base_url}/v1/models", headers={"Authorization": f"Bearer {user.key[:-4]}0000"})
    assert (forged.status_code, last_used()) == (401, None)
    user.client.get("/v1/models")
    wait_until(last_used, "note")


def test_refusing_those_who_have_no_key_leaves_nothing_in_the_database(stack: Stack, guarded: str) -> None:
    before = entries(stack)
    with httpx.Client(base_url=guarded) as client:
        for k in range(200):
            assert client.post("/v1/samples", headers={"Authorization": f"Bearer tt_{k:012x}_{k:064x}"}).is_error
    assert entries(stack) == before


def test_refusing_a_key_again_and_again_writes_only_so_much(stack: Stack, new_user: NewUser) -> None:
    user, before = new_user(), entries(stack)
    for _ in range(200):
        assert user.client.delete("/v1/schedules/sch_nope").status_code == 403
    assert 60 <= entries(stack) - before <= 120


def test_what_no_database_keeps_is_written_down_as_it_was_sent(stack: Stack, new_user: NewUser) -> None:
    user, path = new_user(), "/v1/schedules/a%00%0Ab"
    assert_problem(user.client.delete(path), 403)

    def objects() -> list[str]:
        with stack.registry.read() as session:
            return list(session.scalars(select(AuditEntry.object).where(AuditEntry.actor == user.id)))

    assert wait_until(objects, "entry") == [path]


@pytest.mark.both_engines
def test_the_audit_log_comes_in_pages_with_the_requests_ids(ring: str, new_user: NewUser) -> None:
    admin, user = new_user(Scope.ADMIN), new_user(Scope.TUNE)
    jobs = [
        user.client.post("/v1/tuning-jobs", json={"model": ring, **QUICK}, headers={"X-Request-Id": f"r-{k}"}).json()
        for k in range(3)
    ]
    found: list[Json] = []
    cursor = None
    while len(found) < 3:
        page = admin.client.get("/v1/audit", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        assert len(page["items"]) <= 2
        found += [entry for entry in page["items"] if entry["actor"] == user.id]
        cursor = page["next_cursor"]
        assert cursor or len(found) == 3
    assert [(entry["object"], entry["request_id"]) for entry in found] == [
        (job["id"], f"r-{k}") for k, job in reversed(list(enumerate(jobs)))
    ]


def test_lists_have_ones_own_jobs_and_an_admins_has_all(ring: str, new_user: NewUser) -> None:
    ann, bob, admin = new_user(Scope.TUNE), new_user(Scope.TUNE), new_user(Scope.ADMIN)
    made = {
        user.id: [user.client.post("/v1/tuning-jobs", json={"model": ring, **QUICK}).json()["id"] for _ in range(3)]
        for user in (ann, bob)
    }

    def listed(user: User, **query: str | int) -> list[Json]:
        items: list[Json] = user.client.get("/v1/tuning-jobs", params=query).json()["items"]
        return items

    for user in (ann, bob):
        assert [job["id"] for job in listed(user)] == made[user.id][::-1]
        assert {job["owner"] for job in listed(user)} == {user.id}
        first = user.client.get("/v1/tuning-jobs", params={"limit": 2}).json()
        rest = listed(user, cursor=first["next_cursor"])
        assert [job["id"] for job in (*first["items"], *rest)] == made[user.id][::-1]
    assert {*made[ann.id], *made[bob.id]} <= {job["id"] for job in listed(admin, limit=200)}


def test_what_another_key_had_sampled_is_given_without_a_trace_of_that_key(ring: str, new_user: NewUser) -> None:
    ann, bob = new_user(Scope.SAMPLE), new_user(Scope.SAMPLE)
    body = {"model": ring, "num_steps": 3, "num_images": 2, "seed": 4711}
    hers, his = (user.client.post("/v1/samples", json=body, headers=NPY) for user in (ann, bob))
    assert hers.content == his.content
    places = [answer.headers["content-location"] for answer in (hers, his)]
    assert places[0] != places[1]
    assert bob.client.get(places[1], headers=NPY).content == hers.content
    assert_problem(bob.client.get(places[0], headers=NPY), 404)
    her_job = places[0].split("/")[3]
    told = bob.client.get(places[1].removesuffix("/content")).text
    assert ann.id not in told
    assert her_job not in told


def test_an_idempotency_key_is_of_one_api_keys_requests(ring: str, new_user: NewUser) -> None:
    ann, bob = new_user(Scope.TUNE), new_user(Scope.TUNE)

    def submit(user: User) -> str:
        headers = {"Idempotency-Key": "the-same"}
        answer = user.client.post("/v1/tuning-jobs", json={"model": ring, **QUICK}, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    assert submit(ann) == submit(ann) != submit(bob)


def test_a_key_that_asks_too_often_is_told_when_it_may_again(new_user: NewUser) -> None:
    user, other = new_user(requests_per_minute=5), new_user(requests_per_minute=5)
    answers = [user.client.get("/v1/models") for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    assert_problem(answers[-1], 429, accepted="requests_per_minute")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert other.client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(("broker", "accepted"), [("there", 4), ("away", 8)])
def test_api_processes_count_a_keys_requests_together_while_the_broker_is_there(
    stack: Stack, new_user: NewUser, tmp_path: Path, broker: str, accepted: int
) -> None:
    url = stack.environment["BROKER_URL"] if broker == "there" else f"redis+socket://{tmp_path / 'none.sock'}"
    key = ApiKey(id=new_user().id, requests_per_minute=4)

    async def count() -> int:
        """How many of six requests to each of two processes are let through."""
        let_through = 0
        for limits in (RateLimits(url), RateLimits(url)):
            for _ in range(6):
                with suppress(KeyLimitError):
                    await limits.count(key)
                    let_through += 1
        return let_through

    assert asyncio.run(count()) == accepted


@pytest.mark.both_engines
@pytest.mark.parametrize("kind", ["samples", "tuning-jobs"])
def test_a_daily_quota_holds_however_many_ask_at_once(ring: str, new_user: NewUser, kind: str) -> None:
    """A sample of the ring costs 2 values x 1 step x 1 image.

    A tuning job puts 16 samples at most through its teacher's 20 steps, four times through its own
    2, and through 31 of the untuned sampler on four grids and with up to four times as many; 32 four times through
    the teacher's to check it, and 128 twice through its own 2 for the KL divergence to a mixture, each of 2 values.
    """
    tuning = 2 * (16 * (28 + 31) + 32 * 4 * 20 + 128 * 2 * 2)
    cost, scope = (2, Scope.SAMPLE) if kind == "samples" else (tuning, Scope.TUNE)
    user = new_user(scope, pixel_steps_per_day=3 * cost + 1)

    def post(seed: int) -> httpx.Response:
        body = {"model": ring, "num_steps": 1, "seed": 1000 + seed} if kind == "samples" else {"model": ring, **QUICK}
        return user.client.post(f"/v1/{kind}", json=body, headers=ASYNC)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(8)))
    refused = [answer for answer in answers if answer.status_code != 202]
    assert len(refused) == 5
    problem = assert_problem(refused[0], 429, accepted="pixel_steps_per_day")
    assert f"costs {cost} " in problem["detail"]
    assert 1 <= int(refused[0].headers["retry-after"]) <= 86_400


def test_what_was_sampled_before_costs_nothing(ring: str, new_user: NewUser) -> None:
    user = new_user(Scope.SAMPLE, pixel_steps_per_day=2)
    body = {"model": ring, "num_steps": 1, "seed": 9_999}
    for _ in range(3):
        assert user.client.post("/v1/samples", json=body, headers=NPY).status_code == 200
    assert user.client.post("/v1/samples", json={**body, "seed": 9_998}, headers=NPY).status_code == 429


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
    ],
    ids=str,
)
def test_no_web_page_elsewhere_can_use_an_api_that_asks_for_no_key(client: httpx.Client, headers: Json) -> None:
    before = client.get("/v1/models").json()
    field = next(iter(headers))
    archive = {"archive": ("model.zip", io.BytesIO(b"PK"))}
    for answer in (
        client.get("/v1/models", headers=headers),
        client.post("/v1/models", files=archive, headers=headers),
        client.get("/docs", headers=headers),
    ):
        assert_problem(answer, 403, field, "127.0.0.1")
    assert client.get("/v1/models").json() == before


@pytest.mark.parametrize(
    "header", [("X-Forwarded-For", "203.0.113.7"), ("Forwarded", "for=203.0.113.7"), ("X-Real-IP", "203.0.113.7")]
)
def test_nobody_elsewhere_can_use_an_api_that_asks_for_no_key_by_a_proxy_here(
    client: httpx.Client, header: tuple[str, str]
) -> None:
    answer = client.get("/v1/models", headers=dict([header]))
    assert_problem(answer, 403, accepted="203.0.113.7; accepted: this machine")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80", "127.1.2.3", "[::1]:8000"])
def test_this_machine_is_served_by_all_its_names(client: httpx.Client, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org", "localhost.example.org"])
def test_what_is_not_loopback_is_not_taken_for_it(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("command", ["up", "api"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_no_api_starts_beyond_this_machine_without_authentication(
    command: str,
    host: str,
    tmp_path: Path,
    timetuner: Run,  # noqa: F811
) -> None:
    result = timetuner(command, "--host", host, AUTH="off", TIMETUNER_HOME=str(tmp_path / "home"))
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert f"timetuner: {command}: --host is {host!r} while AUTH is 'off'; accepted: a loopback" in result.err
    assert not list(tmp_path.iterdir())


@contextmanager
def api(stack: Stack, registry: Registry, host: str) -> Iterator[httpx.Client]:
    """An API on a database of its own, with AUTH unset, and a client on this machine."""
    port = free_port()
    environment = {name: value for name, value in stack.environment.items() if name != "AUTH"}
    environment["DATABASE_URL"] = registry.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "service", "api", "--host", host, "--port", str(port)]
    process = subprocess.Popen(command, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def answers() -> bool:
                try:
                    return client.get("/healthz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers, "API")
            yield client
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def own_registry(stack: Stack, make_database_url: MakeDatabaseUrl, tmp_path: Path) -> Iterator[Registry]:
    """An empty one, of the stack's engine."""
    registry = Registry(make_database_url("sqlite" if stack.registry.is_sqlite else "postgresql", tmp_path))
    yield registry
    registry.close()


def test_on_this_machine_a_key_is_needed_as_soon_as_there_is_one(stack: Stack, own_registry: Registry) -> None:
    with api(stack, own_registry, "127.0.0.1") as client:
        model = client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
        before = client.post("/v1/tuning-jobs", json={"model": model, **QUICK}).json()
        assert before["owner"] is None
        made = [keys(own_registry, "create", "--name", "n", "--scope", scope) for scope in ("admin", "tune")]
        wait_until(lambda: client.get("/v1/models").status_code == 401, "need of a key")
        admin, user = ({"Authorization": f"Bearer {text}"} for text in made)
        url = f"/v1/tuning-jobs/{before['id']}"
        assert client.get("/v1/models", headers=user).status_code == 200
        assert client.get(url, headers=admin).json()["owner"] is None
        assert_problem(client.get(url, headers=user), 404)
        for line in keys(own_registry, "list").splitlines()[1:]:
            keys(own_registry, "revoke", line.split()[0])
        wait_until(lambda: client.get("/v1/models", headers=admin).status_code == 401, "refusal")
        assert client.get("/v1/models").status_code == 401  # Keys that are all worthless open nothing.


def test_beyond_this_machine_a_key_is_needed_from_the_start(stack: Stack, own_registry: Registry) -> None:
    with api(stack, own_registry, "0.0.0.0") as client:
        for path in ("/v1/models", "/metrics"):
            assert_problem(client.get(path), 401, "Authorization")
        assert client.get("/healthz", headers={"Host": "timetuner.example"}).status_code == 200
        headers = {"Authorization": f"Bearer {keys(own_registry, 'create', '--name', 'prometheus')}"}
        assert client.get("/metrics", headers=headers).status_code == 200
        assert_problem(client.post("/v1/samples", json={"model": "m"}, headers=headers), 403, accepted="'sample'")
