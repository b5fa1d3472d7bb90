"""The application's state, made once and reached by endpoints as `State`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from celery import Celery
from fastapi import Depends, Request

from service.access.keyring import KeyRing
from service.access.limits import RateLimits
from service.artifacts import ArtifactStore
from service.bus import Bus
from service.queue import celery_app
from service.registry.database import Registry
from service.samples.admission import Admission
from service.samples.logic import Catalog, submit_all
from service.samples.news import News
from service.samples.submissions import Submissions
from service.settings import Settings


@dataclass(frozen=True)
class AppState:
    """What the endpoints work with."""

    settings: Settings
    registry: Registry
    artifacts: ArtifactStore
    celery: Celery
    bus: Bus
    news: News
    admission: Admission
    submissions: Submissions
    keys: KeyRing
    rates: RateLimits
    image_shapes: dict[str, list[int]] = field(default_factory=dict)  # by model, none of which ever changes


@contextmanager
def open_state(settings: Settings) -> Iterator[AppState]:
    """The state; on a database that has been migrated."""
    registry, celery = Registry(settings.database_url), celery_app(settings.broker_url)
    bus = Bus(celery, settings.broker_url)
    admission = Admission(registry, settings.max_queued_jobs, settings.max_queue_seconds)
    yield AppState(
        settings,
        registry,
        ArtifactStore(settings.artifacts_url),
        celery,
        bus,
        News(settings.broker_url, admission.ended),
        admission,
        Submissions(partial(submit_all, registry, settings, Catalog()), bus.ring),
        KeyRing(registry, settings.auth),
        RateLimits(settings.broker_url),
    )
    bus.close()
    celery.close()
    registry.close()


async def _state(request: Request) -> AppState:  # async: no thread need be woken for it
    state: AppState = request.app.state.timetuner
    return state


State = Annotated[AppState, Depends(_state)]
