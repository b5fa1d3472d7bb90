"""Registering, reading and deleting models."""

import asyncio
import hashlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

from fastapi.concurrency import run_in_threadpool
from sqlalchemy import exists, select
from sqlalchemy.orm import Session
from ulid import ULID

from service.access.callers import Caller
from service.access.idempotency import Once, make_once
from service.http.errors import (
    ConflictError,
    InvalidError,
    JobFailedError,
    NotFoundError,
    TooManyRequestsError,
    UnavailableError,
)
from service.models.archive import LOC, unpack
from service.registry.database import Registry
from service.registry.jobs import count_queued
from service.registry.models import find_model, open_registration
from service.registry.tables import FINAL_STATES, JobState, Model, ModelRegistration, SampleJob, Schedule, TuningJob
from service.registry.types import new_id
from service.shared.artifacts import ArtifactStore
from service.shared.settings import Settings
from service.state import AppState
from timetuner_core.catalog import BUILTIN_FOLDERS, builtin_specs
from timetuner_core.models.folder_files import ModelFormatError, check_files, files_of, model_files

LOOK_INTERVAL_SECONDS = 0.1  # A waiting request looks this often whether a worker has described its model.


class HandedIn(NamedTuple):
    """What became of an uploaded archive.

    Attributes:
        found: the model or the open registration of the same content, or else a new registration.
        is_new: whether this request made the registration.
        once: the request's idempotency key, to be remembered once there is a model.
    """

    found: Model | ModelRegistration
    is_new: bool
    once: Once | None


def register_builtin(
    registry: Registry, caller: Caller, builtin: str, name: str | None, idempotency_key: str | None = None
) -> tuple[Model, bool]:
    """The built-in's row and whether it was made now: registering it again finds the same row."""
    folder = BUILTIN_FOLDERS.get(builtin)
    content_hash = folder_hash(folder) if folder else hashlib.sha256(f"builtin:{builtin}".encode()).hexdigest()
    spec = builtin_specs()[builtin]
    model = Model(name=name or builtin, content_hash=content_hash, source={"builtin": builtin}, spec=spec)
    return _insert(registry, caller, model, Once.of(caller, "register_model", idempotency_key, content_hash))


def hand_in_archive(
    registry: Registry,
    caller: Caller,
    artifacts: ArtifactStore,
    file: IO[bytes],
    name: str,
    settings: Settings,
    idempotency_key: str | None = None,
) -> HandedIn:
    """Check an uploaded archive as far as its files can be read without PyTorch, and keep it for a worker to describe.

    Raises:
        InvalidError, TooLargeError, TooManyRequestsError, ConflictError: nothing was kept.
    """
    staging = Path(tempfile.mkdtemp(prefix="timetuner-upload-"))
    try:
        unpack(file, staging, 2 * settings.max_body_bytes)
        try:
            check_files(staging)
        except ModelFormatError as error:
            raise InvalidError(str(error), (*LOC, error.field)) from None
        content_hash = folder_hash(staging)
        once = Once.of(caller, "register_model", idempotency_key, content_hash)
        with registry.read() as session:
            if once is not None:
                once.found(session)  # Raises ConflictError if the key was used with another model.
            if found := find_model(session, content_hash) or open_registration(session, content_hash):
                return HandedIn(found, False, once)
            _check_room(session, settings.max_queued_jobs)
        key = f"models/{ULID()}"  # The key is new, because the same content may be deleted at this moment.
        artifacts.put_folder(key, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    registration = ModelRegistration(
        id=new_id("mdl"),
        owner=caller.owner,
        name=name,
        content_hash=content_hash,
        artifact=key,
        request={},
        request_id=caller.request_id,
    )
    try:
        with registry.write() as session:
            session.add(registration)
    except BaseException:
        artifacts.remove(key)
        raise
    return HandedIn(registration, True, once)


async def wait_for_model(state: AppState, registration_id: str) -> Model:
    """The model of a registration, once a worker has described it.

    Raises:
        InvalidError: the worker refused it.
        JobFailedError: the worker could not describe it.
        UnavailableError: none did within `max_wait_seconds`. The registration stays, and the same request finds it.
    """
    seconds = state.settings.max_wait_seconds
    deadline = time.monotonic() + seconds
    while True:
        model = await run_in_threadpool(_outcome, state.registry, registration_id)
        if model is not None:
            return model
        if time.monotonic() > deadline:
            accepted = "the same request again, once a worker runs (GET /readyz tells)"
            raise UnavailableError(f"no worker described the model within {seconds:g} s; accepted: {accepted}")
        await asyncio.sleep(LOOK_INTERVAL_SECONDS)


def remember(registry: Registry, once: Once, model: Model) -> None:
    """Have the request's key stand for this model. Raises: ConflictError, if it was used with another."""
    make_once(registry, once, get_model, lambda _session: model)


def _outcome(registry: Registry, registration_id: str) -> Model | None:
    """The registration's model; None if it is not over."""
    with registry.read() as session:
        registration = session.get_one(ModelRegistration, registration_id)
        if registration.state not in FINAL_STATES:
            return None
        error = registration.error or ""
        if registration.refused_field is not None:
            raise InvalidError(error, (*LOC, registration.refused_field))
        if registration.state != JobState.SUCCEEDED or registration.model_id is None:
            raise JobFailedError(f"the model could not be described: {error}")
        return get_model(session, registration.model_id)


def _check_room(session: Session, max_queued_jobs: int) -> None:
    queued = count_queued(session, ModelRegistration)
    if queued >= max_queued_jobs:
        raise TooManyRequestsError(f"{queued} models wait to be described; accepted: fewer than {max_queued_jobs}")


def get_model(session: Session, model_id: str) -> Model:
    """The model of an id. Raises: NotFoundError."""
    model = session.get(Model, model_id)
    if model is None:
        raise NotFoundError(f"no model {model_id!r}; accepted: an id that GET /v1/models lists")
    return model


def delete_model(registry: Registry, caller: Caller, artifacts: ArtifactStore, model_id: str) -> None:
    """Delete a model nothing refers to, its files included.

    Raises:
        NotFoundError, ConflictError.
    """
    with registry.write() as session:
        model = get_model(session, model_id)
        for referrer in (Schedule, TuningJob, SampleJob):
            if session.scalar(select(exists().where(referrer.model_id == model_id))):
                raise ConflictError(f"model {model_id!r} has {referrer.__tablename__}; accepted: a model without any")
        session.delete(model)
        caller.record(session, "delete_model", model_id)
    if artifact := model.source.get("artifact"):
        artifacts.remove(artifact)


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files."""
    digest = hashlib.sha256()
    for name in model_files(files_of(folder)):
        with (folder / name).open("rb") as file:
            digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _insert(registry: Registry, caller: Caller, model: Model, once: Once | None) -> tuple[Model, bool]:
    """The model's row, or that of the same content which is there already; and whether it was made now."""
    created = False

    def make(session: Session) -> Model:
        nonlocal created
        found = find_model(session, model.content_hash)
        created = found is None
        if found is not None:
            return found
        session.add(model)
        session.flush()
        caller.record(session, "register_model", model.id)
        return model

    return make_once(registry, once, get_model, make)[0], created
