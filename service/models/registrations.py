"""Models that were handed in: how a registration ends, and lists of those that are no models."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.access.visibility import is_visible, visible_model, visible_registration
from service.http.errors import InvalidError, JobFailedError, ServiceError
from service.http.fields import PageQuery, newest_first
from service.registry.tables import FINAL_STATES, JobState, Model, ModelRegistration


def refusal_of(registration: ModelRegistration) -> ServiceError | None:
    """Why a registration did not become a model; None if it did, or is not over.

    A model at fault gives an InvalidError that names the field. All else, such as workers that were lost, gives a
    JobFailedError.
    """
    if registration.state not in FINAL_STATES or registration.state == JobState.SUCCEEDED:
        return None
    error = registration.error or ""
    if registration.refused_field is not None:
        place = next((name for name in ("path", "hub") if name in registration.source), "archive")
        field = registration.refused_field
        return InvalidError(error, ("body", place) if field == place else ("body", place, field))
    return JobFailedError(f"the model could not be described: {error}")


def find_handed_in(session: Session, caller: Caller, model_id: str) -> Model | ModelRegistration | None:
    """The model of an id, or the registration that is not over or was refused; of the same content, the other's model.

    None if there is neither, if the caller may not see it, or if the model has been deleted.
    """
    registration = visible_registration(session, caller, model_id)
    if registration is None or registration.state == JobState.SUCCEEDED:
        return visible_model(session, caller, model_id if registration is None else registration.model_id)
    return registration


def newest_registrations(
    session: Session, caller: Caller, states: Sequence[JobState], page: PageQuery
) -> tuple[Sequence[ModelRegistration], str | None]:
    """One page of the registrations in some states that the caller sees, newest first, and the cursor of the next."""
    query = select(ModelRegistration).where(ModelRegistration.state.in_(states), is_visible(caller, ModelRegistration))
    return newest_first(session, query, ModelRegistration.id, page)
