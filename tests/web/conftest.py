"""A deployment with something to look at, and a real browser."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.registry.jobs import add_event
from service.registry.schedules import next_version
from service.registry.tables import (
    EvaluationRow,
    JobState,
    Schedule,
    ScheduleStatus,
    TuningJob,
    TuningJobEvent,
    TuningJobStep,
    UsageKind,
    UsageTotal,
)
from service.registry.types import utc_now
from service.registry.usage import Payer, Use, add_usage, first_total_id
from service.shared.job_requests import TuningJobRequest
from tests.conftest import StartStack
from tests.keys import guarded, new_user  # noqa: F401 (fixtures)
from tests.stack import Json, Stack

NO_BROWSER = "no Chromium; install it by `apt-get install chromium`"
WAIT_MILLISECONDS = 120_000  # the machine may be busy
expect.set_options(timeout=WAIT_MILLISECONDS)


@dataclass(frozen=True)
class World:
    """All that there is to see."""

    stack: Stack
    url: str
    model: str
    points: str  # a model whose samples are points of the plane
    schedules: list[Json]


@pytest.fixture(scope="session")
def stack(start_stack: StartStack) -> Iterator[Stack]:
    """A deployment on SQLite alone: the page asks the registry through functions that are tested on both engines."""
    stack = start_stack("sqlite")
    stack.client.timeout = 300
    stack.wait_until_ready()
    yield stack
    stack.stop()


@pytest.fixture(scope="session")
def world(stack: Stack) -> World:
    """Jobs and schedules as workers leave them, without the time that these take."""
    model, points = stack.register("digits8"), stack.register("mixture-ring")
    with stack.registry.write() as session:
        ids = [
            store(session, model, 4, "end_to_end", 0.8),
            store(session, model, 8, "end_to_end", 0.7),
            store(session, model, 4, "dmn", 1.1),
            store(session, points, 3, "solver", 0.4),
        ]
        payer = Payer(None, model, UsageKind.TUNING)
        add_usage(session, [(payer, Use(1234, 56_789, 75.25)), (payer._replace(model_id=points), Use(12.5, 600, 0.4))])
        session.execute(update(UsageTotal).where(UsageTotal.model_id == points).values(YESTERDAY))
    schedules = [stack.client.get(f"/v1/schedules/{id}").json() for id in ids]
    assert stack.client.put(f"/v1/models/{model}/aliases/production", json={"schedule": ids[0]}).is_success
    return World(stack, str(stack.client.base_url).rstrip("/"), model, points, schedules)


YESTERDAY = {"day": (day := utc_now().date() - timedelta(days=1)), "id": first_total_id(day) + "_x"}
BEGIN = utc_now() - timedelta(minutes=5)
LEARNED = {"a": [0.75, 0.5, 0.0], "b": [[0.25], [0.125, 0.375], [-0.0625, 0.5, 0.5625]]}


def store(session: Session, model_id: str, num_steps: int, objective: str, score: float) -> str:
    """A job that succeeded, and its schedule; the id of the latter."""
    request = TuningJobRequest.model_validate(
        {"model": model_id, "num_steps": num_steps, "tuner": {"objective": objective}}
    )
    job = TuningJob(
        model_id=model_id,
        request=request.model_dump(mode="json"),
        state=JobState.SUCCEEDED,
        progress=1.0,
        attempt=1,
        network_calls=123_456,
        tuning_seconds=10.0,
        created_at=BEGIN - timedelta(seconds=3),
        started_at=BEGIN,
        finished_at=BEGIN + timedelta(seconds=75),
    )
    session.add(job)
    session.flush()
    ratios = [1 - 0.03 * step for step in range(num_steps)]
    session.add_all(
        TuningJobStep(
            job_id=job.id,
            step_index=step,
            t_ratio=ratio,
            iterations=9,
            memory=[],
            loss=0.1,
            initial_loss=0.5,
            done=True,
        )
        for step, ratio in enumerate(ratios)
    )
    add_event(session, job, "queued")
    add_event(session, job, "started", attempt=1, worker="worker-1@here")
    for k in range(1, 10):
        phase = "teacher" if k == 1 else "tuning"
        add_event(session, job, "progress", progress=k / 10, loss=2.0**-k, t_ratios=ratios, phase=phase)
    add_event(session, job, "succeeded")
    session.flush()
    events = session.scalars(select(TuningJobEvent).where(TuningJobEvent.job_id == job.id).order_by(TuningJobEvent.id))
    for seconds, event in enumerate(events):
        event.created_at = BEGIN + timedelta(seconds=seconds)
    key = request.key()
    schedule = Schedule(
        **key,
        job_id=job.id,
        version=next_version(session, key),
        status=ScheduleStatus.ACCEPTED if score < 1 else ScheduleStatus.REJECTED,
        score=score,
        timesteps=[1 - 0.999 * step / num_steps for step in range(num_steps + 1)],
        t_ratios=ratios,
        solver_table=LEARNED if objective == "solver" else None,
        provenance={"tuner": request.model_dump(mode="json")["tuner"], "seed": 0},
    )
    session.add(schedule)
    session.flush()
    before, after = 4 / num_steps, 4 / num_steps * score
    change = {"change": after - before, "low": after - before - 0.0123, "high": after - before + 0.0123}
    session.add(
        EvaluationRow(
            schedule_id=schedule.id,
            num_samples=512,
            teacher_num_steps=100,
            seed=0,
            teacher_l2_before=before,
            teacher_l2_after=after,
            teacher_l2_change_low=change["low"],
            teacher_l2_change_high=change["high"],
            frechet_before=None,
            frechet_after=None,
            metrics={
                name: {"before": factor * before, "after": factor * after, **change}
                for name, factor in (("teacher_l2", 1), ("sliced_wasserstein", 0.25))
            },
            verdict="accepted" if score < 1 else "undecided",
            reason="as the test has it",
            worth={
                "num_steps": 2.5 * num_steps,
                "is_beyond": False,
                "grid": "uniform",
                "teacher_l2": after,
                "num_samples": 128,
                "untuned": [{"num_steps": k * num_steps, "teacher_l2": before / k} for k in (1, 2, 3)],
            },
            wall_time_seconds=12.5,
            network_calls=123_456,
        )
    )
    return schedule.id


@pytest.fixture(scope="module")  # Playwright has an event loop running, in which other tests could run none.
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI") and os.geteuid() == 0:  # .ci/run has installed it
            pytest.fail(NO_BROWSER)
        pytest.skip(NO_BROWSER)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context()
    context.set_default_timeout(WAIT_MILLISECONDS)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """One that must not have asked another site for anything, nor have logged a fault."""
    page = context.new_page()
    faults: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    yield page
    expected = ("status of 4",)  # The browser notes each answer that is an error, and tests provoke these.
    assert [fault for fault in faults if not any(text in fault for text in expected)] == []
    assert all(host.startswith("127.0.0.1:") or not host for host in hosts), hosts
