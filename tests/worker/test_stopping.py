"""A worker that is told to stop leaves in an orderly way; one whose database goes away waits for it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import OperationalError

from service.registry.tables import TuningJob
from tests.service.problems import assert_problem
from tests.stack import Json, Process, Stack, wait_until
from tests.worker.conftest import Undisturbed
from tests.worker.test_recovery import SPREAD, STEP_BY_STEP


@pytest.mark.parametrize(
    "effort", [{"num_steps": 4, **STEP_BY_STEP}, {"num_steps": 5, **SPREAD}], ids=["one task", "a task per step"]
)
def test_a_worker_told_to_stop_hands_its_job_back_and_another_goes_on(
    fragile: Stack, gratings: str, undisturbed: Undisturbed, effort: Json
) -> None:
    expected = undisturbed(gratings, seed=5, **effort)
    job = fragile.submit(gratings, seed=5, **effort)
    fragile.running(job)
    fragile.end("worker")  # SIGTERM; waits until it has ended
    with fragile.registry.read() as session:
        left = session.get_one(TuningJob, job["id"])
    assert (left.state, left.attempt, left.lease_owner, left.losses) == ("queued", 0, None, 0)
    assert 0 < left.progress < 0.8

    fragile.start("worker")
    done = fragile.finished(job)
    assert (done["state"], done["attempt"]) == ("succeeded", 1)
    schedule = fragile.client.get(f"/v1/schedules/{done['schedule']}").json()
    assert schedule["t_ratios"] == expected["t_ratios"]
    assert schedule["evaluation"]["teacher_l2_after"] == expected["evaluation"]["teacher_l2_after"]


def test_samples_under_way_are_finished_before_a_worker_stops(fragile: Stack, gratings: str) -> None:
    body = {"model": gratings, "num_steps": 100, "num_images": 8, "seed": 3}
    job = fragile.client.post("/v1/samples", json=body, headers={"Prefer": "respond-async"}).json()

    def has_begun() -> bool:
        return bool(fragile.client.get(f"/v1/samples/{job['id']}").json()["state"] != "queued")

    wait_until(has_begun, "sampling")
    fragile.end("worker")
    done = fragile.client.get(f"/v1/samples/{job['id']}").json()
    assert (done["state"], done["error"]) == ("succeeded", None)
    fragile.start("worker")


@contextmanager
def away(stack: Stack) -> Iterator[None]:
    """The stack's database takes no connections, and has lost those it had."""
    with database_lost(stack.registry.engine, stack.registry.is_sqlite):
        yield


@contextmanager
def database_lost(engine: Engine, is_sqlite: bool) -> Iterator[None]:
    if is_sqlite:
        blocking = create_engine(engine.url, isolation_level="AUTOCOMMIT")
        with blocking.connect() as connection:
            connection.execute(text("BEGIN EXCLUSIVE"))
            yield
            connection.execute(text("ROLLBACK"))
        blocking.dispose()
        return
    name = engine.url.database
    url = engine.url.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        yield
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())


@pytest.mark.both_engines
def test_a_job_whose_database_is_away_for_a_while_is_not_failed(
    fragile: Stack, gratings: str, undisturbed: Undisturbed
) -> None:
    expected = undisturbed(gratings, num_steps=4, seed=5, **STEP_BY_STEP)
    job = fragile.submit(gratings, num_steps=4, seed=5, **STEP_BY_STEP)
    fragile.running(job)
    with away(fragile):
        time.sleep(2)  # several saves and renewals
        if not fragile.registry.is_sqlite:  # SQLite has requests wait for the lock.
            refused = fragile.client.get(f"/v1/tuning-jobs/{job['id']}")
            assert_problem(refused, 503, accepted="a new try")
            assert refused.headers["Retry-After"] == "1"
    done = fragile.finished(job)
    assert (done["state"], done["error"]) == ("succeeded", None)
    schedule = fragile.client.get(f"/v1/schedules/{done['schedule']}").json()
    assert schedule["t_ratios"] == expected["t_ratios"]


@pytest.mark.both_engines
def test_a_worker_that_hung_for_longer_than_its_lease_writes_nothing(fragile: Stack, gratings: str) -> None:
    job = fragile.submit(gratings, num_steps=4, seed=11, **STEP_BY_STEP)
    fragile.running(job)
    hung = fragile.processes["worker"]
    wait_until(lambda: stopped_without_the_lock(fragile, hung), "pause between the worker's transactions")
    fragile.start("worker 2")
    try:
        owner = _owner(fragile, job)
        wait_until(lambda: _owner(fragile, job) not in {owner, None}, "another worker at it")
    finally:
        hung.send_signal(signal.SIGCONT)
    done = fragile.finished(job)
    assert (done["state"], done["attempt"]) == ("succeeded", 2)
    listed = fragile.client.get("/v1/schedules", params={"model": gratings, "num_steps": 4}).json()["items"]
    assert [schedule["id"] for schedule in listed if schedule["job"] == job["id"]] == [done["schedule"]]


def stopped_without_the_lock(stack: Stack, process: Process) -> bool:
    """Whether a process could be stopped where it does not hold SQLite's one lock, which nobody can take from it."""
    process.send_signal(signal.SIGSTOP)
    if not stack.registry.is_sqlite:
        return True
    probing = create_engine(stack.registry.url, connect_args={"timeout": 0.5}, isolation_level="AUTOCOMMIT")
    try:
        with probing.connect() as connection:
            connection.execute(text("BEGIN IMMEDIATE"))
            connection.execute(text("ROLLBACK"))
        return True
    except OperationalError:
        process.send_signal(signal.SIGCONT)
        return False
    finally:
        probing.dispose()


def _owner(stack: Stack, job: Json) -> Any:
    with stack.registry.read() as session:
        return session.get_one(TuningJob, job["id"]).lease_owner
