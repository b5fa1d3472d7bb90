"""Deployments to break."""

from collections.abc import Iterator

import pytest

from tests.conftest import ENGINES, StartStack
from tests.registry.conftest import model_id, registry  # noqa: F401
from tests.stack import Stack


@pytest.fixture(scope="module", params=ENGINES)
def fragile(request: pytest.FixtureRequest, start_stack: StartStack) -> Iterator[Stack]:
    """A deployment of this module's own. Each test puts right what it broke."""
    stack = start_stack(request.param)
    stack.wait_until_ready()
    yield stack
    stack.stop()
