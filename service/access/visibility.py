"""Models and schedules that a caller sees. Endpoints answer as if all else did not exist."""

from sqlalchemy import ColumnElement, Select, and_, not_, select, true
from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.registry.keys import Scope
from service.registry.tables import PUBLIC, Model, ModelRegistration, SampleJob, Schedule, TuningJob

CanBePrivate = Model | ModelRegistration | Schedule


def may_see(caller: Caller, row: CanBePrivate) -> bool:
    """Whether something is not private, or private to the caller's key; an admin sees all.

    A schedule of a private model is as private as the model, whatever its own row says: see `visible_schedule`.
    """
    return row.private_to in realms(caller) or caller.may(Scope.ADMIN)


def visible_model(session: Session, caller: Caller, model_id: str | None) -> Model | None:
    """The model of an id, unless it was deleted or the caller may not see it."""
    model = session.get(Model, model_id)
    return model if model is not None and model.deleted_at is None and may_see(caller, model) else None


def visible_registration(
    session: Session, caller: Caller, model_id: str, *, lock: bool = False
) -> ModelRegistration | None:
    """The registration of an id, unless the caller may not see it. `lock` locks it until the transaction ends."""
    registration = session.get(ModelRegistration, model_id, with_for_update=lock)
    return registration if registration is not None and may_see(caller, registration) else None


def visible_schedule(session: Session, caller: Caller, schedule: Schedule | None) -> Schedule | None:
    """A schedule, unless the caller may not see it or its model. Those of a deleted model are seen by nobody."""
    if schedule is None or not may_see(caller, schedule):
        return None
    return None if visible_model(session, caller, schedule.model_id) is None else schedule


def is_visible(caller: Caller, table: type[CanBePrivate]) -> ColumnElement[bool]:
    """`may_see` as a condition of a query."""
    return true() if caller.may(Scope.ADMIN) else table.private_to.in_(realms(caller))


def is_seen_job(caller: Caller, table: type[TuningJob | SampleJob]) -> ColumnElement[bool]:
    """`Caller.sees` as a condition of a query."""
    return true() if caller.may(Scope.ADMIN) else table.owner == caller.owner


def visible_models(caller: Caller) -> Select[Model]:
    """A query of the models that the caller sees."""
    return select(Model).where(Model.deleted_at.is_(None), is_visible(caller, Model))


def hidden_models(caller: Caller) -> Select[str]:
    """A query of the ids of the models that the caller does not see."""
    return select(Model.id).where(not_(and_(Model.deleted_at.is_(None), is_visible(caller, Model))))


def realms(caller: Caller) -> list[str]:
    """The values of `private_to` of what a caller uses without naming it."""
    return [PUBLIC] if caller.owner is None else [PUBLIC, caller.owner]
