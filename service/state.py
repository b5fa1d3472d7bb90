"""State that all areas of the application share, made once. Endpoints get it as `State`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Request

from service.registry.database import Registry
from service.shared.artifacts import ArtifactStore
from service.shared.queue import celery_app
from service.shared.settings import Settings
from service.shared.signals import Bus


@dataclass(frozen=True)
class AppState:
    """The settings, the registry, the artifact store and the two ways to reach workers."""

    settings: Settings
    registry: Registry
    artifacts: ArtifactStore
    celery: Celery
    bus: Bus


@contextmanager
def open_state(settings: Settings) -> Iterator[AppState]:
    """The state, closed when the context ends. The database must have been migrated."""
    registry, celery = Registry(settings.database_url), celery_app(settings.broker_url)
    bus = Bus(celery, settings.broker_url)
    yield AppState(settings, registry, ArtifactStore(settings.artifacts_url), celery, bus)
    bus.close()
    celery.close()
    registry.close()


async def _state(request: Request) -> AppState:
    """Give the state. The dependency is async, so that FastAPI calls it in the event loop without a thread."""
    state: AppState = request.app.state.timetuner
    return state


State = Annotated[AppState, Depends(_state)]
