"""Registering, reading and deleting models."""

import asyncio
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Select, delete, func, not_, or_, select, tuple_
from sqlalchemy.orm import Session
from ulid import ULID

from service.access.callers import Caller
from service.access.idempotency import Once, make_once
from service.access.visibility import is_visible, may_see, visible_model, visible_models, visible_registration
from service.http.errors import ConflictError, InvalidError, NotFoundError, StoreFullError, TooManyRequestsError
from service.http.fields import newest_first
from service.models.archive import LOC, Kind, unpack
from service.models.registrations import find_handed_in, refusal_of
from service.models.schemas import HubModelRequest, ModelQuery, PathModelRequest
from service.registry.database import Registry
from service.registry.jobs import count_queued
from service.registry.keys import Scope
from service.registry.models import find_model, open_registration, why_not_ready
from service.registry.stored_bytes import NoRoomError, take_bytes
from service.registry.tables import (
    FINAL_STATES,
    Model,
    ModelRegistration,
    SampleJob,
    Schedule,
    ScheduleAlias,
    TuningJob,
    UntunedCurveRow,
)
from service.registry.types import new_id, utc_now
from service.shared.artifacts import ArtifactStore, DamagedArtifactError, file_sizes
from service.shared.settings import Settings
from service.state import AppState
from timetuner_core.catalog import BUILTIN_FOLDERS, builtin_specs
from timetuner_core.models.folder_files import ModelFormatError, check_files, folder_hash
from timetuner_core.pipelines.files import check_pipeline_files, pipeline_hash, saved_dtype

LOOK_INTERVAL_SECONDS = 0.1  # A waiting request looks this often whether a worker has described its model.
CARD = "README.md"
MAX_CARD = 50_000  # The page shows so many characters of a card.
MAX_NAMED = 10  # A refusal names so many of each kind.
_NAME = func.lower(Model.name)  # Names are sorted without regard to the case of ASCII letters.


class Dependents(NamedTuple):
    """The jobs and schedules that use a model, as far as the caller sees them.

    Attributes:
        jobs: the ids of those that are not over, by their kind. schedules: ids. Of each, the first `MAX_NAMED + 1`.
        are_hidden: whether there are jobs or schedules of other API keys.
    """

    jobs: dict[str, Sequence[str]]
    schedules: Sequence[str]
    are_hidden: bool


class HandedIn(NamedTuple):
    """The outcome of an uploaded archive.

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
    registry: Registry,
    caller: Caller,
    builtin: str,
    name: str | None,
    idempotency_key: str | None = None,
    private: bool = False,
) -> tuple[Model, bool]:
    """The built-in's row and whether it was made now: registering it again finds the same row.

    Raises: InvalidError, if it is to be private and the caller has no key.
    """
    folder = BUILTIN_FOLDERS.get(builtin)
    content_hash = folder_hash(folder) if folder else hashlib.sha256(f"builtin:{builtin}".encode()).hexdigest()
    spec = builtin_specs()[builtin]
    model = Model(
        name=name or builtin,
        content_hash=content_hash,
        source={"builtin": builtin},
        spec=spec,
        owner=caller.owner,
        private_to=caller.private_to(private),
    )
    return _insert(registry, caller, model, _once(caller, idempotency_key, content_hash, private))


def hand_in_archive(
    registry: Registry,
    caller: Caller,
    artifacts: ArtifactStore,
    file: IO[bytes],
    name: str,
    settings: Settings,
    idempotency_key: str | None = None,
    private: bool = False,
    kind: Kind = "auto",
    dtype: str = "auto",
) -> HandedIn:
    """Check an uploaded archive as far as its files can be read without PyTorch, and keep it for a worker to describe.

    Args:
        kind: what it is read as. dtype: that a pipeline is loaded in; `auto` is that of its denoiser's files.

    Raises:
        InvalidError, TooLargeError, TooManyRequestsError, ConflictError, StoreFullError: nothing was kept.
        NotFoundError: what the same request made before has been deleted.
    """
    private_to = caller.private_to(private)
    staging = Path(tempfile.mkdtemp(prefix="timetuner-upload-"))
    try:
        is_pipeline, ignored_files = unpack(file, staging, 2 * settings.max_body_bytes, kind)
        if dtype != "auto" and not is_pipeline:
            message = f"dtype is {dtype!r}, but the archive is read as a network; accepted: auto, or a whole pipeline"
            raise InvalidError(message, ("body", "dtype"), dtype)
        try:
            source, content_hash = _checked_pipeline(staging, dtype) if is_pipeline else _checked_network(staging)
        except ModelFormatError as error:
            raise InvalidError(str(error), (*LOC, error.field)) from None
        once = _once(caller, idempotency_key, content_hash, private)
        with registry.read() as session:
            found = _made_before(session, caller, once) or find_model(session, content_hash, private_to)
            if found := found or open_registration(session, content_hash, private_to):
                return HandedIn(found, False, once, ignored_files)
            _check_room(session, settings.max_queued_jobs)
        key = f"models/{ULID()}"  # The key is new, because the same content may be deleted at this moment.
        _take_room(registry, staging, settings.max_stored_bytes)
        artifacts.put_folder(key, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    registration = ModelRegistration(
        id=new_id("mdl"),
        owner=caller.owner,
        private_to=private_to,
        name=name,
        content_hash=content_hash,
        artifact=key,
        source=source,
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


def _take_room(registry: Registry, folder: Path, most: int) -> None:
    """Count the bytes of a folder that is about to be stored. Raises: StoreFullError, if there is no room for it."""
    if not most:
        return
    needed = sum(file_sizes(folder))
    try:
        with registry.write() as session:
            take_bytes(session, needed, most)
    except NoRoomError as error:
        raise StoreFullError(error.text, LOC, needed) from None


def _checked_network(folder: Path) -> tuple[dict[str, Any], str]:
    """The entries for a registration's `source`, and the content hash. Raises: ModelFormatError."""
    check_files(folder)
    return {}, folder_hash(folder)


def _checked_pipeline(folder: Path, dtype: str) -> tuple[dict[str, Any], str]:
    """The entries for a registration's `source`, and the content hash. Raises: ModelFormatError."""
    check_pipeline_files(folder)
    dtype = saved_dtype(folder) if dtype == "auto" else dtype
    return {"kind": "pipeline", "dtype": dtype}, pipeline_hash(folder, dtype)


def hand_in_folder(
    registry: Registry,
    caller: Caller,
    request: PathModelRequest | HubModelRequest,
    settings: Settings,
    idempotency_key: str | None = None,
) -> HandedIn:
    """Have a worker look for a pipeline that is in a folder of the operator, or in the cache of a hub.

    Raises:
        InvalidError: the operator allows no such folders. TooManyRequestsError, ConflictError: nothing was kept.
        NotFoundError: what the same request made before has been deleted.
    """
    source: dict[str, Any] = {"kind": "pipeline", "dtype": request.dtype}
    if isinstance(request, PathModelRequest):
        if settings.models_dir is None:
            message = "the operator has set no MODELS_DIR; accepted: a builtin, a hub's name, or an archive"
            raise InvalidError(message, ("body", "path"), request.path)
        place, source["path"] = request.path, request.path
    else:
        place, source["hub"], source["revision"] = request.hub, request.hub, request.revision
    private_to = caller.private_to(request.private)
    asked = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    once = _once(caller, idempotency_key, asked, request.private)
    registration = ModelRegistration(
        id=new_id("mdl"),
        owner=caller.owner,
        private_to=private_to,
        name=request.name or place.rpartition("/")[2],
        content_hash=asked,
        source=source,
        request={},
        request_id=caller.request_id,
    )
    with registry.write() as session:
        found = _made_before(session, caller, once) or open_registration(session, asked, private_to)
        if found is not None:
            return HandedIn(found, False, once, [])
        _check_room(session, settings.max_queued_jobs)
        session.add(registration)
    return HandedIn(registration, True, once, [])


async def wait_for_model(
    state: AppState, caller: Caller, registration_id: str, seconds: float
) -> Model | ModelRegistration:
    """The model of a registration, once a worker has described it; the registration, if none has within `seconds`.

    Raises:
        InvalidError: the worker refused it.
        JobFailedError: no worker could describe it.
        NotFoundError: it was deleted meanwhile.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = await run_in_threadpool(_outcome, state.registry, caller, registration_id)
        if isinstance(found, Model) or time.monotonic() >= deadline:
            return found
        await asyncio.sleep(LOOK_INTERVAL_SECONDS)


def remember(registry: Registry, caller: Caller, once: Once, answered: Model | ModelRegistration) -> None:
    """Have the request's key stand for what it made. Raises: ConflictError, if the key was used with another."""
    make_once(registry, once, lambda session, made: get_handed_in(session, caller, made), lambda _session: answered)


def get_handed_in(session: Session, caller: Caller, model_id: str) -> Model | ModelRegistration:
    """The model of an id, or what became of its registration so far. Raises: NotFoundError."""
    found = find_handed_in(session, caller, model_id)
    if found is None:
        raise NotFoundError(f"no model {model_id!r}; accepted: an id that GET /v1/models lists")
    return found


def _once(caller: Caller, idempotency_key: str | None, content_hash: str, private: bool) -> Once | None:
    request = f"{content_hash} private" if private else content_hash
    return Once.of(caller, "register_model", idempotency_key, request)


def _made_before(session: Session, caller: Caller, once: Once | None) -> Model | ModelRegistration | None:
    """The model that the same request made. Raises: ConflictError, if its key was used with another; NotFoundError."""
    made = None if once is None else once.found(session)
    return None if made is None else get_handed_in(session, caller, made)


def _outcome(registry: Registry, caller: Caller, registration_id: str) -> Model | ModelRegistration:
    """The registration's model, or the registration if it is not over. Raises: the error of a refused one."""
    with registry.read() as session:
        found = get_handed_in(session, caller, registration_id)
        if isinstance(found, ModelRegistration) and (refusal := refusal_of(found)):
            raise refusal
        return found


def _check_room(session: Session, max_queued_jobs: int) -> None:
    queued = count_queued(session, ModelRegistration)
    if queued >= max_queued_jobs:
        raise TooManyRequestsError(f"{queued} models wait to be described; accepted: fewer than {max_queued_jobs}")


def get_model(session: Session, caller: Caller, model_id: str) -> Model:
    """The model of an id. Raises: NotFoundError; ConflictError, if it was handed in and is not ready."""
    model = visible_model(session, caller, model_id)
    if model is None:
        registration = visible_registration(session, caller, model_id)
        if registration is not None and (reason := why_not_ready(session, registration)):
            raise ConflictError(reason)
        raise NotFoundError(f"no model {model_id!r}; accepted: an id that GET /v1/models lists")
    return model


def listed(session: Session, caller: Caller, query: ModelQuery) -> tuple[Sequence[Model], str | None]:
    """One page of the models that the caller sees and that match, and the cursor of the next. Raises: InvalidError."""
    found = visible_models(caller)
    if query.search is not None:
        found = found.where(
            or_(*(column.icontains(query.search, autoescape=True) for column in (Model.name, Model.id)))
        )
    if query.sort == "newest":
        return newest_first(session, found, Model.id, query)
    if query.cursor is not None:
        last = session.get(Model, query.cursor)
        if last is None or not may_see(caller, last):
            message = f"no model {query.cursor!r}; accepted: the next_cursor of the page before"
            raise InvalidError(message, ("query", "cursor"), query.cursor)
        place = tuple_(func.lower(last.name), last.id)
        found = found.where(Model.id > last.id if query.sort == "oldest" else tuple_(_NAME, Model.id) > place)
    order = [Model.id] if query.sort == "oldest" else [_NAME, Model.id]
    rows = session.scalars(found.order_by(*order).limit(query.limit + 1)).all()
    return rows[: query.limit], rows[query.limit - 1].id if len(rows) > query.limit else None


def card_of(artifacts: ArtifactStore, model: Model) -> str | None:
    """The card that came with a model, without its header: of a built-in one, or of an uploaded pipeline."""
    source = model.source
    try:
        if "builtin" in source:
            content = (BUILTIN_FOLDERS[source["builtin"]] / CARD).read_bytes()
        elif "artifact" in source:
            content = artifacts.read(f"{source['artifact']}/{CARD}")
        else:
            return None  # Only workers read files that are not ours.
    except (KeyError, OSError, DamagedArtifactError):
        return None
    text = content.decode(errors="replace")[:MAX_CARD]
    _, fence, card = text.removeprefix("---\n").partition("\n---\n")
    return (card if text.startswith("---\n") and fence else text).strip() or None


def rename_model(registry: Registry, caller: Caller, model_id: str, name: str) -> Model:
    """Give a model another name. Raises: NotFoundError; ConflictError, if it is not ready."""
    with registry.write() as session:
        model = get_model(session, caller, model_id)
        model.name = name
        caller.record(session, "rename_model", model_id)
        return model


def delete_model(
    registry: Registry, caller: Caller, artifacts: ArtifactStore, model_id: str, cascade: bool = False
) -> None:
    """Delete a model and its files in the artifact store, or the registration of one that was refused.

    Jobs that are over and stored samples remain. The model's row does, too, as they name it.

    Args:
        cascade: delete the model's schedules and their aliases, too.

    Raises:
        NotFoundError.
        ConflictError: a job that is not over uses the model, or it has schedules and `cascade` is not set.
    """
    with registry.write() as session:
        refused = visible_registration(session, caller, model_id, lock=True)
        if refused is not None and refusal_of(refused) is not None:
            session.delete(refused)
            artifact = refused.artifact
        else:
            model = get_model(session, caller, model_id)
            # New jobs and schedules refer to the row, so they wait for this lock.
            session.refresh(model, with_for_update=True)
            _check_unused(session, caller, model_id, cascade)
            for kept in (ScheduleAlias, UntunedCurveRow):
                session.execute(delete(kept).where(kept.model_id == model_id))
            model.deleted_at = utc_now()
            artifact = model.source.get("artifact")  # Files in a folder of the operator stay.
        caller.record(session, "delete_model", model_id)
    if artifact:
        artifacts.remove(artifact)


def dependents(session: Session, caller: Caller, model_id: str) -> Dependents:
    """The jobs that are not over, and the schedules, of a model."""
    named: dict[str, Sequence[str]] = {}
    are_hidden = False
    for job_class, kind in ((TuningJob, "tuning job"), (SampleJob, "sampling job")):
        jobs = select(job_class.id).where(job_class.model_id == model_id, job_class.state.not_in(FINAL_STATES))
        if job_class is SampleJob:
            jobs = jobs.where(SampleJob.parent_id.is_(None))
        if not caller.may(Scope.ADMIN):
            are_hidden |= _any(session, jobs.where(job_class.owner.is_distinct_from(caller.owner)))
            jobs = jobs.where(job_class.owner == caller.owner)
        named[kind] = session.scalars(jobs.limit(MAX_NAMED + 1)).all()
    schedules = select(Schedule.id).where(Schedule.model_id == model_id)
    are_hidden |= _any(session, schedules.where(not_(is_visible(caller, Schedule))))
    seen = schedules.where(is_visible(caller, Schedule)).order_by(Schedule.id.desc())
    return Dependents(named, session.scalars(seen.limit(MAX_NAMED + 1)).all(), are_hidden)


def _check_unused(session: Session, caller: Caller, model_id: str, cascade: bool) -> None:
    """Refuse to delete a model that is used, and name what uses it as far as the caller sees it. Raises: ConflictError.

    Private schedules of other keys are never deleted with a model, except by an admin.
    """
    found = dependents(session, caller, model_id)
    using = [text for kind, ids in found.jobs.items() for text in _named(ids, kind)]
    accepted = "a model whose jobs are over (cancel them, or wait)" if using else "cascade=true deletes them, too"
    if found.are_hidden:
        using.append("jobs or schedules of other API keys")
        accepted = "a model whose jobs are over, and that is nobody else's; or a key that has 'admin'"
    if not cascade:
        using += _named(found.schedules, "schedule")
    if using:
        raise ConflictError(f"model {model_id!r} is used by {', '.join(using)}; accepted: {accepted}")


def _any(session: Session, ids: Select[str]) -> bool:
    return session.scalar(ids.limit(1)) is not None


def _named(ids: Sequence[str], kind: str) -> list[str]:
    """The first few of some rows by name, such as "schedule 'sch_1'", and whether there are more."""
    more = [f"more {kind}s"] if len(ids) > MAX_NAMED else []
    return [f"{kind} {row_id!r}" for row_id in ids[:MAX_NAMED]] + more


def _insert(registry: Registry, caller: Caller, model: Model, once: Once | None) -> tuple[Model, bool]:
    """The model's row, or that of the same content which is there already; and whether it was made now."""
    created = False

    def make(session: Session) -> Model:
        nonlocal created
        found = find_model(session, model.content_hash, model.private_to)
        created = found is None
        if found is not None:
            return found
        session.add(model)
        session.flush()
        caller.record(session, "register_model", model.id)
        return model

    return make_once(registry, once, lambda session, made: get_model(session, caller, made), make)[0], created
