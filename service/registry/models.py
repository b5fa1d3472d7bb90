"""Models that were handed in: a row each until a worker has described them, and then a `Model`."""

from datetime import datetime
from typing import Any

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from service.registry.jobs import is_free
from service.registry.tables import FINAL_STATES, AuditEntry, JobState, Model, ModelRegistration


def find_model(session: Session, content_hash: str, private_to: str) -> Model | None:
    """The model with this content, unless it was deleted: the public one, or the private one of a key."""
    there = select(Model).where(Model.content_hash == content_hash, Model.deleted_at.is_(None))
    return session.scalar(there.where(Model.private_to == private_to))


def open_registration(session: Session, content_hash: str, private_to: str) -> ModelRegistration | None:
    """The registration of this content that is not over yet: the public one, or the private one of a key."""
    is_open = ModelRegistration.state.not_in(FINAL_STATES) & (ModelRegistration.private_to == private_to)
    query = select(ModelRegistration).where(ModelRegistration.content_hash == content_hash, is_open)
    return session.scalar(query.order_by(ModelRegistration.id).limit(1))


def next_registration(session: Session) -> str | None:
    """The id of the oldest registration that a worker may claim."""
    free = select(ModelRegistration.id).where(is_free(ModelRegistration))
    return session.scalar(free.order_by(ModelRegistration.id).limit(1))


def keep_described(session: Session, registration: ModelRegistration, spec: dict[str, Any]) -> Model:
    """The model of a described registration: a new row with the registration's id, or the model of the same content.

    Raises:
        IntegrityError: the same content was registered in another transaction at the same time.
    """
    model = find_model(session, registration.content_hash, registration.private_to)
    if model is None:
        source = registration.whole_source
        same = ("id", "name", "content_hash", "owner", "private_to")
        model = Model(**{name: getattr(registration, name) for name in same}, source=source, spec=spec)
        session.add(model)
        session.flush()
        if registration.owner is not None:
            about = {"object": model.id, "outcome": "done", "request_id": registration.request_id}
            session.add(AuditEntry(actor=registration.owner, action="register_model", **about))
    registration.model_id = model.id
    return model


def why_not_ready(session: Session, registration: ModelRegistration) -> str | None:
    """Why there is no model of a registration's id, and what is accepted; None if the model was deleted."""
    model_id = registration.id
    accepted = "a model that is ready"
    if registration.state not in FINAL_STATES:
        return f"model {model_id!r} is {registration.state}: no worker has described it yet; accepted: {accepted}"
    if registration.state != JobState.SUCCEEDED:
        return f"model {model_id!r} was refused ({registration.error}); accepted: {accepted}"
    same_content = find_model(session, registration.content_hash, registration.private_to)
    if same_content is not None:
        return f"model {model_id!r} has the content of another; accepted: {same_content.id!r}"
    return None  # It was ready, and has been deleted.


def old_registrations(session: Session, before: datetime, limit: int) -> list[tuple[ModelRegistration, bool]]:
    """Registrations that were over before a time, each with whether a model has its files."""
    has_files = exists().where(Model.id == ModelRegistration.id, Model.deleted_at.is_(None))
    query = select(ModelRegistration, has_files).where(ModelRegistration.finished_at < before).limit(limit)
    return [(registration, used) for registration, used in session.execute(query)]
