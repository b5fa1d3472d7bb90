"""State that all areas of the application share, made once. Endpoints get it as `State`."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from anyio import CapacityLimiter, to_thread
from celery import Celery
from fastapi import Depends, Request

from service.registry.database import Registry
from service.shared.artifacts import ArtifactStore
from service.shared.queue import celery_app
from service.shared.settings import Settings
from service.shared.signals import Bus

# Threads and connections of one process that may wait for another writer of the database. The others are for readers.
MAX_WRITERS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class AppState:
    """The settings, the registry, the artifact store and the two ways to reach workers.

    Attributes:
        writers: has a token for each request that writes. Requests without one wait for it without a thread.
        exporters: has one token, as each export that needs PyTorch loads it in a process of its own.
    """

    settings: Settings
    registry: Registry
    artifacts: ArtifactStore
    celery: Celery
    bus: Bus
    writers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_WRITERS))
    exporters: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))

    async def run_write(self, write: Callable[..., T], *args: object) -> T:
        """Call a function that writes to the registry, in a thread."""
        return await to_thread.run_sync(write, *args, limiter=self.writers)


@contextmanager
def open_state(settings: Settings) -> Iterator[AppState]:
    """The state, closed when the context ends. The database must have been migrated."""
    registry = Registry(settings.database_url, settings.database_lock_seconds, settings.database_statement_seconds)
    celery = celery_app(settings.broker_url)
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


async def _write_slot(state: State) -> AsyncIterator[None]:
    request = object()
    await state.writers.acquire_on_behalf_of(request)
    try:
        yield
    finally:
        state.writers.release_on_behalf_of(request)


# A dependency of each endpoint that writes and that a thread runs. Requests that wait for another writer of the
# database would otherwise hold all threads, and no GET would be answered.
WRITES = Depends(_write_slot, scope="function")
