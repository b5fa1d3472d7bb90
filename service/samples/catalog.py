"""A cache of models and resolved schedules, valid until the registry counts a change."""

from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.access.visibility import may_see
from service.http.errors import InvalidError
from service.registry.keys import Scope
from service.registry.samples import changes
from service.registry.tables import Model, Schedule
from service.request_checks import get_requested_model
from service.schedules.logic import find_for_sampling, resolve
from service.shared.job_requests import OWN_CLIPPING, OWN_SAMPLER, SampleRequest

MAX_CACHED_SCHEDULES = 10_000  # The cache of resolved schedules is emptied when it reaches this size.


class Catalog:
    """Models and resolved schedules, cached until any of them changes.

    One thread may use it at a time. Cached rows belong to no session, because a rollback would expire their values.
    """

    def __init__(self) -> None:
        self._changes = -1
        self._models: dict[str, Model] = {}
        self._schedules: dict[str, Schedule | None] = {}

    def refresh(self, session: Session) -> None:
        """Empty the cache if anything has changed. Each transaction calls this first."""
        now = changes(session)
        if now != self._changes:
            self._changes = now
            self._models, self._schedules = {}, {}

    def model(self, session: Session, caller: Caller, model_id: str) -> Model:
        """Raises: InvalidError."""
        model = self._models.get(model_id)
        if model is None or not may_see(caller, model):
            model = get_requested_model(session, caller, model_id)
            session.expunge(model)
            self._models[model_id] = model
        return model

    def schedule(self, session: Session, caller: Caller, request: SampleRequest) -> Schedule | None:
        """The schedule that a request is sampled with, None for untuned. Raises: InvalidError."""
        whose = (caller.owner, caller.may(Scope.ADMIN))  # What a caller sees decides what is found.
        key = str((whose, request.schedule, request.timesteps == "default", request.key()))
        if key not in self._schedules:
            if len(self._schedules) >= MAX_CACHED_SCHEDULES:
                self._schedules = {}
            schedule = _schedule(session, caller, request)
            if schedule is not None:
                session.expunge(schedule)
            self._schedules[key] = schedule
        return self._schedules[key]


def _schedule(session: Session, caller: Caller, request: SampleRequest) -> Schedule | None:
    if request.schedule == "none":
        return None
    if request.timesteps != "default":
        message = "timesteps is for untuned sampling; accepted: 'default', or schedule 'none'"
        raise InvalidError(message, ("body", "timesteps"), request.timesteps)
    if request.schedule == "auto":
        return resolve(session, caller, request)[0]
    schedule = find_for_sampling(session, caller, request.model, request.schedule)
    # A schedule may be used with another guidance than it was tuned for, and at other sizes, but not with another
    # sampler or step number.
    is_of_sampler = request.sampler in (schedule.sampler, OWN_SAMPLER)
    if not is_of_sampler or schedule.num_steps != request.num_steps:
        message = f"schedule {schedule.id!r} is for {schedule.num_steps} steps of {schedule.sampler}"
        raise InvalidError(f"{message}; accepted: num_steps of {schedule.num_steps}", ("body", "num_steps"))
    clipping = None if schedule.clipping == OWN_CLIPPING else schedule.clipping
    if clipping != request.clipping:
        message = f"clipping is {request.clipping!r}, and schedule {schedule.id!r} is for another"
        raise InvalidError(f"{message}; accepted: {clipping or 'null'}", ("body", "clipping"), request.clipping)
    return schedule
