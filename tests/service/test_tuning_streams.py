"""Streams of tuning jobs: what they cost while nothing happens, and that each still gets its events."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, event

from service.app import create_app
from service.registry.database import Registry
from service.registry.jobs import add_event, finish
from service.registry.tables import JobState, TuningJob
from service.shared.settings import Settings
from tests.registry.conftest import model_id, registry  # noqa: F401

STREAMS = 30
WATCHED_SECONDS = 1.5
MAX_STATEMENTS = 40  # Thirty streams that look for themselves make two statements four times a second each: 360.


async def follow(app: FastAPI, job_id: str, received: list[str]) -> None:
    """Read a job's events as a client that does not hang up."""

    async def send(message: Any) -> None:
        received.append(message.get("body", b"").decode())

    async def receive() -> Any:
        await asyncio.Event().wait()

    path = f"/v1/tuning-jobs/{job_id}/events"
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http"}
    headers = [(b"host", b"127.0.0.1"), (b"accept", b"text/event-stream")]
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers}
    await app(scope | {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}, receive, send)


def event_types(received: list[str]) -> list[str]:
    lines = "".join(received).splitlines()
    return [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.both_engines
def test_idle_streams_share_their_looks_at_the_database_and_still_get_every_event(
    registry: Registry,  # noqa: F811
    model_id: str,  # noqa: F811
    database_url: str,
    tmp_path: Path,
) -> None:
    with registry.write() as session:
        jobs = [TuningJob(model_id=model_id, request={}) for _ in range(STREAMS)]
        session.add_all(jobs)
        session.flush()
        for job in jobs:
            add_event(session, job, "queued")

    async def count_and_end() -> tuple[int, list[list[str]]]:
        settings = Settings(timetuner_home=tmp_path, database_url=database_url, broker_url="redis://127.0.0.1:1/0")
        app = create_app(settings)
        statements: Counter[str] = Counter()

        def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            statements[statement] += 1

        async with app.router.lifespan_context(app):
            received: list[list[str]] = [[] for _ in jobs]
            following: list[Awaitable[None]] = [
                asyncio.create_task(follow(app, job.id, texts)) for job, texts in zip(jobs, received, strict=True)
            ]
            await until(lambda: all(event_types(texts) == ["queued"] for texts in received))
            await asyncio.sleep(0.5)
            event.listen(Engine, "before_cursor_execute", count)
            await asyncio.sleep(WATCHED_SECONDS)
            event.remove(Engine, "before_cursor_execute", count)
            with registry.write() as session:
                for job in jobs:
                    finish(session, session.get_one(TuningJob, job.id), JobState.FAILED, "for this test")
            async with asyncio.timeout(20):
                await asyncio.gather(*following)
        return statements.total(), received

    total, received = asyncio.run(count_and_end())
    assert total <= MAX_STATEMENTS
    assert [event_types(texts) for texts in received] == [["queued", "failed"]] * STREAMS
