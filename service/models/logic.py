"""Registering, reading and deleting models."""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from sqlalchemy import exists, select
from sqlalchemy.orm import Session
from ulid import ULID

from service.access.callers import Caller
from service.access.idempotency import Once, make_once
from service.http.errors import ConflictError, InvalidError, NotFoundError
from service.models.archive import LOC, unpack
from service.registry.database import Registry
from service.registry.tables import Model, SampleJob, Schedule, TuningJob
from service.shared.artifacts import ArtifactStore
from timetuner_core.models.folder_files import files_of, model_files
from timetuner_core.models.loading import (
    BUILTIN_FOLDERS,
    DiffusionModel,
    ModelFormatError,
    load_builtin,
    load_folder,
)


def register_builtin(
    registry: Registry, caller: Caller, builtin: str, name: str | None, idempotency_key: str | None = None
) -> tuple[Model, bool]:
    """The built-in's row and whether it was made now: registering it again finds the same row."""
    folder = BUILTIN_FOLDERS.get(builtin)
    content_hash = folder_hash(folder) if folder else hashlib.sha256(f"builtin:{builtin}".encode()).hexdigest()
    spec = describe(load_builtin(builtin))
    model = Model(name=name or builtin, content_hash=content_hash, source={"builtin": builtin}, spec=spec)
    return _insert(registry, caller, model, Once.of(caller, "register_model", idempotency_key, content_hash))


def register_archive(
    registry: Registry,
    caller: Caller,
    artifacts: ArtifactStore,
    file: IO[bytes],
    name: str,
    max_bytes: int,
    idempotency_key: str | None = None,
) -> tuple[Model, bool]:
    """Check an uploaded archive by loading it, keep its folder, and make its row; content seen before is found.

    Raises:
        InvalidError, TooLargeError: nothing was kept.
    """
    staging = Path(tempfile.mkdtemp(prefix="timetuner-upload-"))
    try:
        unpack(file, staging, max_bytes)
        try:
            spec = describe(load_folder(staging))
        except ModelFormatError as error:
            raise InvalidError(str(error), (*LOC, error.field)) from None
        content_hash = folder_hash(staging)
        once = Once.of(caller, "register_model", idempotency_key, content_hash)
        with registry.read() as session:
            found = _find(session, content_hash)
        if found is not None and once is None:
            return found, False
        key = f"models/{ULID()}"  # its own: the same content may be deleted at this moment
        artifacts.put_folder(key, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    model = Model(name=name, content_hash=content_hash, source={"artifact": key}, spec=spec)
    try:
        kept, created = _insert(registry, caller, model, once)
    except BaseException:
        artifacts.remove(key)
        raise
    if not created:
        artifacts.remove(key)
    return kept, created


def get_model(session: Session, model_id: str) -> Model:
    """Raises: NotFoundError."""
    model = session.get(Model, model_id)
    if model is None:
        raise NotFoundError(f"no model {model_id!r}")
    return model


def get_requested_model(session: Session, model_id: str, where: str = "body") -> Model:
    """The model that a request's body or query names. Raises: InvalidError, naming the field."""
    model = session.get(Model, model_id)
    if model is None:
        accepted = "the id of a registered model, as GET /v1/models lists them"
        raise InvalidError(f"no model {model_id!r}; accepted: {accepted}", (where, "model"), model_id)
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


def describe(model: DiffusionModel) -> dict[str, Any]:
    """The `ModelSpec` of a loaded model."""
    return {
        "sample_shape": list(model.sample_shape),
        "image_shape": list(model.image_shape),
        "model_type": model.model_type,
        "T": model.noise_schedule.T,
        "t_min": model.noise_schedule.t_min,
        "num_train_timesteps": model.noise_schedule.max_num_steps,
        "num_classes": model.num_classes,
        "null_class_label": model.null_class_label,
        "condition_shape": None if model.condition_shape is None else list(model.condition_shape),
        "guidance_types": list(model.guidance_types),
        "num_parameters": model.num_parameters,
        "has_uncond_condition": model.uncond_condition is not None,
        "has_conditions": model.draw_conditions is not None,
        "has_data": model.draw_data is not None,
    }


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
        found = _find(session, model.content_hash)
        created = found is None
        if found is not None:
            return found
        session.add(model)
        session.flush()
        caller.record(session, "register_model", model.id)
        return model

    return make_once(registry, once, get_model, make)[0], created


def _find(session: Session, content_hash: str) -> Model | None:
    return session.scalar(select(Model).where(Model.content_hash == content_hash))
