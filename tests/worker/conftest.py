"""Deployments to break."""

from collections.abc import Iterator

import pytest

from tests.conftest import ENGINES, StartStack
from tests.registry.conftest import model_id, registry  # noqa: F401
from tests.stack import Stack


@pytest.fixture(scope="session", params=ENGINES)
def breakable(request: pytest.FixtureRequest, start_stack: StartStack) -> Iterator[Stack]:
    """One deployment for each engine, shared by all tests that break something."""
    stack = start_stack(request.param)
    stack.wait_until_ready()
    yield stack
    stack.stop()


@pytest.fixture
def fragile(breakable: Stack) -> Iterator[Stack]:
    """The deployment, put right after each test: one that fails must not fail those after it."""
    yield breakable
    breakable.put_right()


@pytest.fixture
def gratings(fragile: Stack) -> str:
    """A model whose ratios meet no bound. A bound would end their tuning at once."""
    return fragile.register("mixture-gratings")
