"""Deployments to break."""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from tests.conftest import ENGINES, StartStack
from tests.registry.conftest import model_id, registry  # noqa: F401
from tests.stack import Json, Stack

Undisturbed: TypeAlias = Callable[..., Json]


@pytest.fixture(scope="session", params=ENGINES)
def breakable(request: pytest.FixtureRequest, start_stack: StartStack) -> Iterator[Stack]:
    """One deployment for each engine, shared by all tests that break something."""
    stack = start_stack(request.param)
    stack.wait_until_ready()
    yield stack
    stack.stop()


@pytest.fixture(scope="session")
def undisturbed(breakable: Stack) -> Undisturbed:
    """`undisturbed(model, **request)`: the schedule of a job that nothing disturbs. Each request is tuned once."""
    made: dict[str, Json] = {}

    def tune(model: str, **request: Any) -> Json:
        key = json.dumps([model, request], sort_keys=True)
        if key not in made:
            made[key] = breakable.tune(model, **request)
        return made[key]

    return tune


@pytest.fixture
def fragile(breakable: Stack) -> Iterator[Stack]:
    """The deployment, put right after each test: one that fails must not fail those after it."""
    yield breakable
    breakable.put_right()


@pytest.fixture
def gratings(fragile: Stack) -> str:
    """A model whose ratios meet no bound. A bound would end their tuning at once."""
    return fragile.register("mixture-gratings")
