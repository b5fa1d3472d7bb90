"""Hostile input at the real API: refused with the right problem, soon, in little memory, and leaving nothing."""

import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from service.registry.tables import Base, JobState, ModelRegistration
from tests.conftest import ENGINES, MakeDatabaseUrl
from tests.service.hostile import AUTHORIZATIONS, JSON, MODEL, RAW, Hostile, corpus, model_files, upload, zipped
from tests.service.problems import assert_problem
from tests.stack import Stack, wait_until

SECONDS = 10.0  # An idle machine takes less than one; see docs/security.md.
GROWTH_KIB = 50 * 1024


class Target:
    """An API, its broker and a worker, which looks into the models that pass the API's own checks."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.temporary = stack.home / "tmp"
        self.temporary.mkdir()
        stack.environment |= {"TMPDIR": str(self.temporary), "MAX_BODY_BYTES": "20000000"}
        stack.start("broker", "api", "worker")
        wait_until(self._answers, "answer")
        self.model = stack.register("mixture-ring")
        welcome = upload(lambda: zipped(model_files()))  # The worker has loaded what it needs for models then.
        assert self.send(welcome).status_code == 201

    def send(self, request: Hostile) -> httpx.Response:
        return self.send_made(request, request.content())

    def send_made(self, request: Hostile, content: bytes) -> httpx.Response:
        content = content.replace(MODEL.encode(), self.model.encode())
        path = request.path.replace(MODEL, self.model)
        headers = [(name.encode(), value.encode("latin-1")) for name, value in request.headers.items()]
        return self.stack.client.request(request.method, path, content=content, headers=headers)

    def kept(self) -> tuple[dict[str, int], set[str], list[Path]]:
        """All that a request may leave behind: rows, artifacts and temporary files.

        A registration that a worker refused is no leftover: its row says why until it is swept with old samples.
        """
        with self.stack.registry.read() as session:
            tables = {
                t.name: session.scalar(select(func.count()).select_from(t)) or 0 for t in Base.metadata.sorted_tables
            }
            refused = select(func.count()).where(ModelRegistration.state == JobState.FAILED)
            tables["model_registrations"] -= session.scalar(refused) or 0
        return tables, self.stack.files(), list(self.temporary.iterdir())

    def wait_until_nothing_is_left(self, before: tuple[dict[str, int], set[str], list[Path]]) -> None:
        """A worker removes refused files just after the answer, so `before` may hold some of an earlier test's."""

        def nothing_is_left() -> bool:
            tables, files, temporary = self.kept()
            return tables == before[0] and files <= before[1] and set(temporary) <= set(before[2])

        wait_until(nothing_is_left, "state without leftovers", seconds=10)

    def resident_kib(self) -> int:
        """The memory of the API and of the worker, together."""
        return sum(_resident_kib(self.stack.processes[name].pid) for name in ("api", "worker"))

    def _answers(self) -> bool:
        assert self.stack.processes["api"].poll() is None
        try:
            return self.stack.client.get("/healthz").is_success
        except httpx.TransportError:
            return False


def _resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@pytest.fixture(scope="module", params=ENGINES)
def target(request: pytest.FixtureRequest, make_database_url: MakeDatabaseUrl) -> Iterator[Target]:
    with tempfile.TemporaryDirectory(prefix="timetuner-test-") as folder:
        stack = Stack(Path(folder), make_database_url(request.param, Path(folder)))
        try:
            yield Target(stack)
        finally:
            stack.stop()


def test_there_are_enough() -> None:
    assert len(corpus()) + len(RAW) + len(AUTHORIZATIONS) >= 200


@pytest.mark.parametrize("name", corpus())
def test_a_hostile_request_is_refused_and_leaves_nothing(target: Target, name: str) -> None:
    request, before = corpus()[name], target.kept()
    response = target.send(request)
    assert response.status_code in request.statuses, response.text
    problem = assert_problem(response, response.status_code)
    assert len(response.content) < 500_000
    assert "Traceback" not in response.text
    assert problem["request_id"] == response.headers.get("x-request-id")
    target.wait_until_nothing_is_left(before)


def test_refusing_all_of_them_takes_little_time_and_memory(
    target: Target, record_property: Callable[[str, object], None]
) -> None:
    def seconds_of(request: Hostile) -> float:
        content = request.content()
        began = time.perf_counter()
        target.send_made(request, content)
        return time.perf_counter() - began

    before = target.resident_kib()
    times = {name: seconds_of(request) for name, request in corpus().items()}
    growth = target.resident_kib() - before
    slowest = max(times, key=lambda name: times[name])
    record_property("figures", (len(times), statistics.median(times.values()), slowest, times[slowest], growth))
    print(
        f"{len(times)} inputs; median {statistics.median(times.values()):.4f} s; slowest {slowest!r} "
        f"{times[slowest]:.3f} s; RSS grew by {growth} KiB"
    )
    assert times[slowest] < SECONDS
    assert statistics.median(times.values()) < 1
    assert growth < GROWTH_KIB


@pytest.mark.parametrize("name", RAW)
def test_what_is_not_http_is_refused_and_hung_up_on(target: Target, name: str) -> None:
    before = target.kept()
    answer = exchange(target, RAW[name])
    assert answer == b"" or 400 <= int(answer.split()[1]) < 500, answer[:500]
    assert answer == b"" or b"application/problem+json" in answer
    target.wait_until_nothing_is_left(before)
    assert target.stack.client.get("/healthz").is_success


@pytest.mark.parametrize("name", AUTHORIZATIONS)
def test_a_malformed_authorization_never_is_the_services_fault(target: Target, name: str) -> None:
    value = AUTHORIZATIONS[name].encode("latin-1")
    response = target.stack.client.get("/v1/models", headers=[(b"Authorization", value)])
    assert response.status_code < 500
    body = target.stack.client.post("/v1/models", content=b"{}", headers=[(b"Authorization", value), *JSON.items()])
    assert_problem(body, body.status_code)
    assert body.status_code < 500


def exchange(target: Target, content: bytes, seconds: float = 60) -> bytes:
    """The answer of a connection to these bytes, until it is closed."""
    url = target.stack.client.base_url
    with socket.create_connection((url.host, url.port), timeout=seconds) as connection:
        answer = b""
        try:
            connection.sendall(content)
            while piece := connection.recv(65_536):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
        return answer
