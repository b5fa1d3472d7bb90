"""The thread of a worker that describes models which were handed in. It needs PyTorch only once there is one."""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery import Celery

from service.registry.database import Registry
from service.registry.jobs import take_back_expired
from service.registry.models import next_registration
from service.registry.tables import FINAL_STATES, ModelRegistration
from service.shared.artifacts import ArtifactStore
from service.shared.settings import Settings
from service.shared.signals import MODEL_CHANNEL, Bus

if TYPE_CHECKING:
    from worker.runtime import Runtime

logger = logging.getLogger(__name__)

LISTEN_SECONDS = 1.0
PAUSE_SECONDS = 0.2


class Describer:
    """Describes models beside whatever else the worker does, so that none has to wait for a tuning job to end."""

    def __init__(
        self, settings: Settings, celery: Celery, stopping: threading.Event, runtime: Callable[[], "Runtime"]
    ) -> None:
        """`runtime` is called when the first model is to be described."""
        self._registry = Registry(settings.database_url)
        self._max_attempts = settings.max_attempts
        self._artifacts = ArtifactStore(settings.artifacts_url)
        self._bus = Bus(celery, settings.broker_url)
        self._stopping = stopping
        self._runtime = runtime
        self._thread = threading.Thread(target=self._describe_until_stopped, name="describer", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the model at hand, once the worker is stopping. What takes longer is left to another worker."""
        self._thread.join(seconds)

    def _describe_until_stopped(self) -> None:
        with self._bus.subscribe_to_work(MODEL_CHANNEL) as subscription:
            while not self._stopping.is_set():
                try:
                    self._describe_waiting()
                except Exception:  # The database or the broker may be away: look again later.
                    logger.exception("cannot look for models")
                    self._stopping.wait(LISTEN_SECONDS)
                while not self._stopping.is_set() and not subscription.has_message(LISTEN_SECONDS):
                    pass
                # Without a broker every look reports work. This pause bounds how often the registry is asked.
                self._stopping.wait(PAUSE_SECONDS)

    def _describe_waiting(self) -> None:
        while not self._stopping.is_set():
            waiting = self.next()
            if waiting is None:
                return
            from worker.registering import register

            if not self._runtime().run(ModelRegistration, waiting, register):
                return
            self._remove_unused_files(waiting)

    def next(self) -> str | None:
        """The registration to take next.

        A lost worker may have been killed by the model itself, so an expired lease counts as a loss before anybody
        claims the registration again. One that has lost `max_attempts` workers is refused.
        """
        with self._registry.read() as session:
            waiting = next_registration(session)
        if waiting is None:
            return None
        with self._registry.write() as session:
            take_back_expired(session, ModelRegistration, self._max_attempts)
            return next_registration(session)

    def _remove_unused_files(self, registration_id: str) -> None:
        """Delete the files of a model that was refused, or whose content is already registered."""
        with self._registry.read() as session:
            registration = session.get(ModelRegistration, registration_id)
        if registration is None:
            return  # Somebody deleted it, and its files with it.
        is_used = registration.state not in FINAL_STATES or registration.model_id == registration.id
        if registration.artifact is not None and not is_used:
            self._artifacts.remove(registration.artifact)
