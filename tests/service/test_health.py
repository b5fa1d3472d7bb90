"""Readiness, with workers that are stand-ins on a broker in memory."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from fastapi.testclient import TestClient

from service import health
from service.app import create_app
from service.shared.queue import celery_app
from service.shared.settings import Settings


@contextmanager
def workers(app: Celery, queues: list[list[str]]) -> Iterator[None]:
    """Workers that reply with the queues they serve."""
    stop = threading.Event()
    with app.connection() as connection:
        channel = connection.channel()
        for k, names in enumerate(queues):

            def active_queues(_: Any, names: list[str] = names, **__: Any) -> list[dict[str, str]]:
                return [{"name": name} for name in names]

            node = app.control.mailbox.Node(f"worker{k}", handlers={"active_queues": active_queues}, channel=channel)
            node.listen()

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection.drain_events(timeout=0.05)
                except TimeoutError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def test_readiness_waits_for_no_reply_beyond_those_that_it_needs(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(database_url=database_url, timetuner_home=tmp_path)
    with TestClient(create_app(settings), client=("127.0.0.1", 1), base_url="http://127.0.0.1") as api:
        celery = celery_app("memory://")
        celery.conf.broker_transport_options["polling_interval"] = 0.01
        state = api.app.state  # type: ignore[attr-defined]
        state.timetuner = replace(state.timetuner, celery=celery)
        monkeypatch.setattr(health, "REPLY_SECONDS", 0.5)
        with workers(celery, [["sampling"]]):
            answer = api.get("/readyz")
            assert (answer.status_code, answer.json()["workers"]) == (503, "none for tuning")
        monkeypatch.setattr(health, "REPLY_SECONDS", 60.0)
        with workers(celery, [["sampling"], ["tuning"], ["sampling", "tuning"]]):
            began = time.monotonic()
            answers = [api.get("/readyz").json() for _ in range(3)]
            assert time.monotonic() - began < 60
            assert all(answer["ready"] for answer in answers), answers
