"""An empty, migrated registry on each engine."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from service.registry.database import Registry
from service.registry.tables import Model


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url)
    yield registry
    registry.close()


@pytest.fixture
def model_id(registry: Registry) -> str:
    with registry.write() as session:
        model = Model(name="ring", content_hash="0" * 64, source={"builtin": "mixture-ring"}, spec={})
        session.add(model)
    return model.id


@pytest.fixture(params=[-1, 1], ids=["slow clock", "fast clock"])
def wrong_by(request: pytest.FixtureRequest) -> timedelta:
    return timedelta(days=request.param)
