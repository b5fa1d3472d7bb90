"""While others write and the database is locked, reading goes on, and what cannot be done is refused in time."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import text
from starlette.testclient import TestClient

from service.app import create_app
from service.models import endpoints as models
from service.registry.database import Registry
from service.samples import endpoints as samples
from service.schedules import endpoints as schedules
from service.shared.settings import Settings
from service.state import WRITES
from service.tuning_jobs import endpoints as tuning_jobs
from service.web import forms

pytestmark = pytest.mark.both_engines

WAITING = 45  # requests at once, which is more than an API has threads


@contextmanager
def api(database_url: str, home: Path, **settings: Any) -> Iterator[TestClient]:
    """An API alone, without a broker."""
    given = {"timetuner_home": home, "database_url": database_url, "broker_url": "redis://127.0.0.1:1/0", **settings}
    app = create_app(Settings(**given))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        yield client


@contextmanager
def locked(database_url: str) -> Iterator[None]:
    """Another process is writing: on SQLite nobody else can; on PostgreSQL nobody can even read models."""
    registry = Registry(database_url)
    with ExitStack() as exits:
        session = exits.enter_context(registry.write())
        # On SQLite, the first statement of a transaction that writes takes the lock.
        session.execute(text("SELECT 1" if registry.is_sqlite else "LOCK TABLE models IN ACCESS EXCLUSIVE MODE"))
        yield
    registry.close()


def seconds_of(client: TestClient, path: str) -> float:
    began = time.monotonic()
    assert client.get(path).status_code == 200
    return time.monotonic() - began


def test_health_and_reads_do_not_wait_behind_requests_that_write(database_url: str, tmp_path: Path) -> None:
    with api(database_url, tmp_path, database_lock_seconds=60) as client, ThreadPoolExecutor(WAITING) as pool:
        model = client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
        job = {"model": model, "num_steps": 2}
        with locked(database_url):
            posts: list[Future[httpx.Response]] = [
                pool.submit(client.post, "/v1/tuning-jobs", json=job) for _ in range(WAITING)
            ]
            time.sleep(1)
            assert not any(post.done() for post in posts)
            assert seconds_of(client, "/healthz") < 5
            assert seconds_of(client, "/v1/tuning-jobs") < 5
        assert {post.result().status_code for post in posts} == {202}


def test_health_answers_while_no_thread_is_free(database_url: str, tmp_path: Path) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("reads of SQLite never wait for a lock")
    with api(database_url, tmp_path, database_lock_seconds=3) as client, ThreadPoolExecutor(WAITING) as pool:
        client.get("/v1/models")
        with locked(database_url):
            gets = [pool.submit(client.get, "/v1/models") for _ in range(WAITING)]
            time.sleep(1)
            assert seconds_of(client, "/healthz") < 2
            answers = [get.result() for get in gets]
        assert {answer.status_code for answer in answers} == {503}


def test_a_write_that_waits_too_long_is_answered_503(database_url: str, tmp_path: Path) -> None:
    with api(database_url, tmp_path, database_lock_seconds=0.3) as client:
        job = {"model": client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"], "num_steps": 2}
        with locked(database_url):
            answer = client.post("/v1/tuning-jobs", json=job)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["detail"] == "the database cannot be used at the moment; accepted: a new try"
        assert client.post("/v1/tuning-jobs", json=job).status_code == 202


def test_every_endpoint_that_writes_in_a_thread_has_a_slot() -> None:
    routes = [route for area in (models, tuning_jobs, schedules, samples, forms) for route in area.router.routes]
    writing = [
        route
        for route in routes
        if isinstance(route, APIRoute) and route.methods != {"GET"} and not iscoroutinefunction(route.endpoint)
    ]
    assert len(writing) > 10
    for route in writing:
        calls = {dependency.dependency for dependency in route.dependencies}
        assert WRITES.dependency in calls, route.path
