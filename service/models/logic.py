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
from service.http.errors import ConflictError, InvalidError, NotFoundError, TooManyRequestsError
from service.models.archive import LOC, unpack
from service.models.registrations import find_handed_in, refusal_of
from service.registry.database import Registry
from service.registry.jobs import count_queued
from service.registry.models import find_model, open_registration, why_not_ready
from service.registry.tables import Model, ModelRegistration, SampleJob, Schedule, TuningJob
from service.registry.types import new_id
from service.shared.artifacts import ArtifactStore
from service.shared.settings import Settings
from service.state import AppState
from timetuner_core.catalog import BUILTIN_FOLDERS, builtin_specs
from timetuner_core.models.folder_files import ModelFormatError, check_files, folder_hash

LOOK_INTERVAL_SECONDS = 0.1  # A waiting request looks this often whether a worker has described its model.


class HandedIn(NamedTuple):
    """What became of an uploaded archive.

    Attributes:
        found: the model or the open registration of the same content, or else a new registration.
        is_new: whether this request made the registration.
        once: the request's idempotency key, to be remembered with what the request is answered with.
        ignored_files: the files of this archive that nothing reads.
    """

    found: Model | ModelRegistration
    is_new: bool
    once: Once | None
    ignored_files: list[str]


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
        NotFoundError: what the same request made before has been deleted.
    """
    staging = Path(tempfile.mkdtemp(prefix="timetuner-upload-"))
    try:
        ignored_files = unpack(file, staging, 2 * settings.max_body_bytes)
        try:
            check_files(staging)
        except ModelFormatError as error:
            raise InvalidError(str(error), (*LOC, error.field)) from None
        content_hash = folder_hash(staging)
        once = Once.of(caller, "register_model", idempotency_key, content_hash)
        with registry.read() as session:
            found = _made_before(session, once) or find_model(session, content_hash)
            if found := found or open_registration(session, content_hash):
                return HandedIn(found, False, once, ignored_files)
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
        request={"ignored_files": ignored_files},
        request_id=caller.request_id,
    )
    try:
        with registry.write() as session:
            session.add(registration)
    except BaseException:
        artifacts.remove(key)
        raise
    return HandedIn(registration, True, once, ignored_files)


async def wait_for_model(state: AppState, registration_id: str, seconds: float) -> Model | ModelRegistration:
    """The model of a registration, once a worker has described it; the registration, if none has within `seconds`.

    Raises:
        InvalidError: the worker refused it.
        JobFailedError: no worker could describe it.
        NotFoundError: it was deleted meanwhile.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = await run_in_threadpool(_outcome, state.registry, registration_id)
        if isinstance(found, Model) or time.monotonic() >= deadline:
            return found
        await asyncio.sleep(LOOK_INTERVAL_SECONDS)


def remember(registry: Registry, once: Once, answered: Model | ModelRegistration) -> None:
    """Have the request's key stand for what it made. Raises: ConflictError, if the key was used with another."""
    make_once(registry, once, get_handed_in, lambda _session: answered)


def get_handed_in(session: Session, model_id: str) -> Model | ModelRegistration:
    """The model of an id, or what became of its registration so far. Raises: NotFoundError."""
    found = find_handed_in(session, model_id)
    if found is None:
        raise NotFoundError(f"no model {model_id!r}; accepted: an id that GET /v1/models lists")
    return found


def _made_before(session: Session, once: Once | None) -> Model | ModelRegistration | None:
    """What the same request made. Raises: ConflictError, if its key was used with another; NotFoundError."""
    made = None if once is None else once.found(session)
    return None if made is None else get_handed_in(session, made)


def _outcome(registry: Registry, registration_id: str) -> Model | ModelRegistration:
    """The registration's model, or the registration if it is not over. Raises: the error of a refused one."""
    with registry.read() as session:
        found = get_handed_in(session, registration_id)
        if isinstance(found, ModelRegistration) and (refusal := refusal_of(found)):
            raise refusal
        return found


def _check_room(session: Session, max_queued_jobs: int) -> None:
    queued = count_queued(session, ModelRegistration)
    if queued >= max_queued_jobs:
        raise TooManyRequestsError(f"{queued} models wait to be described; accepted: fewer than {max_queued_jobs}")


def get_model(session: Session, model_id: str) -> Model:
    """The model of an id. Raises: NotFoundError; ConflictError, if it was handed in and is not ready."""
    model = session.get(Model, model_id)
    if model is None:
        if reason := why_not_ready(session, model_id):
            raise ConflictError(reason)
        raise NotFoundError(f"no model {model_id!r}; accepted: an id that GET /v1/models lists")
    return model


def delete_model(registry: Registry, caller: Caller, artifacts: ArtifactStore, model_id: str) -> None:
    """Delete a model nothing refers to, or the registration of one that was refused; its files included.

    Raises:
        NotFoundError, ConflictError.
    """
    with registry.write() as session:
        refused = session.get(ModelRegistration, model_id, with_for_update=True)
        if refused is not None and refusal_of(refused) is not None:
            session.delete(refused)
            artifact: str | None = refused.artifact
        else:
            model = get_model(session, model_id)
            for referrer in (Schedule, TuningJob, SampleJob):
                if session.scalar(select(exists().where(referrer.model_id == model_id))):
                    name = referrer.__tablename__
                    raise ConflictError(f"model {model_id!r} has {name}; accepted: a model without any")
            session.delete(model)
            artifact = model.source.get("artifact")
        caller.record(session, "delete_model", model_id)
    if artifact:
        artifacts.remove(artifact)


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
