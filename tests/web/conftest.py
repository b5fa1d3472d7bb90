"""A deployment with something to look at, and a real browser."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.conftest import StartStack
from tests.service.conftest import guarded, new_user  # noqa: F401 (fixtures)
from tests.stack import Json, Stack

NO_BROWSER = "no Chromium; install it by `apt-get install chromium`"
WAIT_MILLISECONDS = 120_000  # the machine may be busy
TUNER = {"total_iters": 3, "population_size": 16, "teacher_num_steps": 10}
EVALUATION = {"num_samples": 16, "teacher_num_steps": 16}


@dataclass(frozen=True)
class World:
    """What there is to see."""

    stack: Stack
    url: str
    model: str
    points: str  # a model whose samples are points of the plane
    schedules: list[Json]


@pytest.fixture(scope="session")
def stack(start_stack: StartStack) -> Iterator[Stack]:
    """On SQLite alone: the page asks the registry through functions that are tested on both engines."""
    stack = start_stack("sqlite")
    stack.client.timeout = 300
    stack.wait_until_ready()
    yield stack
    stack.stop()


@pytest.fixture(scope="session")
def world(stack: Stack) -> World:
    model, points = stack.register("digits8"), stack.register("mixture-ring")
    common = {"evaluation": EVALUATION}
    schedules = [stack.tune(model, num_steps=steps, tuner=TUNER, **common) for steps in (4, 8)]
    schedules.append(stack.tune(model, num_steps=4, tuner={"objective": "dmn"}, **common))
    schedules.append(stack.tune(points, num_steps=3, tuner=TUNER, **common))
    alias = {"schedule": schedules[0]["id"]}
    assert stack.client.put(f"/v1/models/{model}/aliases/production", json=alias).is_success
    return World(stack, str(stack.client.base_url).rstrip("/"), model, points, schedules)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"):
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
    expected = ("status of 4",)  # what a test provokes: the browser notes each answer that is an error
    assert [fault for fault in faults if not any(text in fault for text in expected)] == []
    assert all(host.startswith("127.0.0.1:") or not host for host in hosts), hosts
