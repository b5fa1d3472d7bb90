"""Models and resolved schedules, kept in memory until the registry says that they changed."""

from sqlalchemy.orm import Session

from service.http.errors import InvalidError
from service.registry.samples import changes
from service.registry.tables import Model, Schedule
from service.request_checks import get_requested_model
from service.schedules.logic import find_for_sampling, resolve
from service.shared.sample_request import SampleRequest

REMEMBERED = 10_000  # resolved schedules, before they are forgotten


class Catalog:
    """Models and resolved schedules, remembered until the registry says that any of them has changed.

    For one thread at a time. What is remembered belongs to no session: one that is rolled back would take its values.
    """

    def __init__(self) -> None:
        self._changes = -1
        self._models: dict[str, Model] = {}
        self._schedules: dict[str, Schedule | None] = {}

    def refresh(self, session: Session) -> None:
        """Forget what no longer holds; first thing in each transaction."""
        now = changes(session)
        if now != self._changes:
            self._changes = now
            self._models, self._schedules = {}, {}

    def model(self, session: Session, model_id: str) -> Model:
        """Raises: InvalidError."""
        if model_id not in self._models:
            model = get_requested_model(session, model_id)
            session.expunge(model)
            self._models[model_id] = model
        return self._models[model_id]

    def schedule(self, session: Session, request: SampleRequest) -> Schedule | None:
        """Which schedule a request is to be sampled with. Raises: InvalidError."""
        key = str((request.schedule, request.timesteps == "default", request.key()))
        if key not in self._schedules:
            if len(self._schedules) >= REMEMBERED:
                self._schedules = {}
            schedule = _schedule(session, request)
            if schedule is not None:
                session.expunge(schedule)
            self._schedules[key] = schedule
        return self._schedules[key]


def _schedule(session: Session, request: SampleRequest) -> Schedule | None:
    if request.schedule == "none":
        return None
    if request.timesteps != "default":
        message = "timesteps is for untuned sampling; accepted: 'default', or schedule 'none'"
        raise InvalidError(message, ("body", "timesteps"), request.timesteps)
    if request.schedule == "auto":
        return resolve(session, request)[0]
    schedule = find_for_sampling(session, request.model, request.schedule)
    # A schedule may be tried at another guidance than it was tuned for, but its steps are its steps.
    if (schedule.sampler, schedule.num_steps) != (request.sampler, request.num_steps):
        message = f"schedule {schedule.id!r} is for {schedule.num_steps} steps of {schedule.sampler}"
        raise InvalidError(f"{message}; accepted: num_steps of {schedule.num_steps}", ("body", "num_steps"))
    return schedule
