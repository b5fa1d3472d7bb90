"""/v1/models"""

import json
import re
from functools import partial
from typing import Annotated, Any, NamedTuple

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from sqlalchemy import select
from starlette.datastructures import UploadFile

from service.access.callers import MayWriteModels, needs
from service.access.idempotency import GivenKey
from service.http.errors import (
    ConflictError,
    InvalidError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
    UnsupportedMediaTypeError,
    error_responses,
)
from service.http.fields import JSON_TYPE, PageParams, PathId, check_fields, newest_first
from service.http.validation import FieldsError
from service.models import logic
from service.models.schemas import BuiltinModelRequest, ModelOut, ModelPage
from service.registry.tables import Model, ModelRegistration
from service.shared.fields import PRINTABLE
from service.state import WRITES, AppState, State

router = APIRouter(prefix="/v1/models", tags=["models"])

MULTIPART = "multipart/form-data"
UPLOADS = CapacityLimiter(2)  # Two archives are unpacked at once. Others wait without a thread.
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON_TYPE: {
                "schema": {"$ref": "#/components/schemas/BuiltinModelRequest"},
                "example": {"builtin": "digits8"},
            },
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["archive"],
                    "additionalProperties": False,
                    "properties": {
                        "archive": {
                            "type": "string",
                            "format": "binary",
                            "description": "A zip, tar or tar.gz of a diffusers-format folder.",
                        },
                        "name": {"type": "string", "maxLength": 200, "pattern": PRINTABLE},
                    },
                }
            },
        },
    }
}


async def _json(request: Request) -> Any:
    """The body as JSON, or None if it is none."""
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        return None


class Registration(NamedTuple):
    """A body: a built-in's request, or an uploaded archive and its name.

    Attributes:
        asked_name: the name that the request gives, if it gives one.
    """

    builtin: BuiltinModelRequest | None
    archive: UploadFile | None
    name: str | None
    asked_name: str | None


async def _parse(request: Request) -> Registration:
    """The body, by its content type."""
    given = request.headers.get("content-type", "")
    content_type = given.partition(";")[0].strip().lower()
    if content_type == JSON_TYPE:
        try:
            builtin = BuiltinModelRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise FieldsError(error, "body", BuiltinModelRequest, await _json(request)) from None
        check_fields(await request.body())
        return Registration(builtin, None, None, builtin.name)
    if content_type != MULTIPART:
        accepted = f"{JSON_TYPE} for a built-in model, {MULTIPART} for an archive"
        raise UnsupportedMediaTypeError(
            f"Content-Type is {given!r}; accepted: {accepted}", ("header", "Content-Type"), given
        )
    form = await request.form(max_files=1, max_fields=5)
    archive, name = form.get("archive"), form.get("name")
    if not isinstance(archive, UploadFile):
        raise InvalidError("archive is missing; accepted: a zip, tar or tar.gz file", ("body", "archive"))
    if unknown := form.keys() - {"archive", "name"}:
        field = min(unknown)[:100]
        raise InvalidError(f"there is no field {field!r}; accepted: archive, name", ("body", field))
    asked_name = name if isinstance(name, str) and name else None
    name = asked_name or archive.filename or "model"
    if len(name) > 200 or not re.fullmatch(PRINTABLE, name):
        raise InvalidError("accepted as name: up to 200 printable characters", ("body", "name"), name[:300])
    return Registration(None, archive, name, asked_name)


@router.post(
    "",
    status_code=201,
    operation_id="register_model",
    openapi_extra=REQUEST_BODY,
    responses={
        200: {"model": ModelOut, "description": "The same content was registered before."},
        **error_responses(UnsupportedMediaTypeError, TooLargeError, InvalidError, ConflictError, UnavailableError),
    },
)
async def register_model(
    caller: MayWriteModels,  # It comes first, so that the scope is checked before the body is read.
    parsed: Annotated[Registration, Depends(_parse)],
    state: State,
    response: Response,
    idempotency_key: GivenKey = None,
) -> ModelOut:
    """Register a model: a built-in one by name, or an uploaded archive of a diffusers-format folder."""
    builtin, archive, name, asked_name = parsed
    if builtin is not None:
        model, created = await state.run_write(
            logic.register_builtin, state.registry, caller, builtin.builtin, builtin.name, idempotency_key
        )
    else:
        assert archive is not None and name is not None
        hand_in = partial(
            logic.hand_in_archive, state.registry, caller, state.artifacts, archive.file, name, state.settings
        )
        handed_in = await to_thread.run_sync(hand_in, idempotency_key, limiter=UPLOADS)
        model = await _described(state, handed_in.found)
        created = handed_in.is_new and model.id == handed_in.found.id
        if handed_in.once is not None:
            await state.run_write(logic.remember, state.registry, handed_in.once, model)
    if asked_name is not None and model.name != asked_name:
        accepted = "no name, or that one; or DELETE it first"
        message = f"name is {asked_name!r}, but this content is model {model.id!r}, named {model.name!r}"
        raise ConflictError(f"{message}; accepted: {accepted}", ("body", "name"), asked_name)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/models/{model.id}"
    return ModelOut.model_validate(model)


async def _described(state: AppState, found: Model | ModelRegistration) -> Model:
    """The model that a worker makes of a registration."""
    if isinstance(found, Model):
        return found
    await run_in_threadpool(state.bus.announce_models)
    return await logic.wait_for_model(state, found.id)


@router.get("", operation_id="list_models", dependencies=[needs()], responses=error_responses(InvalidError))
def list_models(state: State, page: PageParams) -> ModelPage:
    """The registered models, newest first."""
    with state.registry.read() as session:
        rows, cursor = newest_first(session, select(Model), Model.id, page)
        return ModelPage(items=[ModelOut.model_validate(row) for row in rows], next_cursor=cursor)


@router.get("/{model_id}", operation_id="get_model", dependencies=[needs()], responses=error_responses(NotFoundError))
def get_model(model_id: PathId, state: State) -> ModelOut:
    """One model."""
    with state.registry.read() as session:
        return ModelOut.model_validate(logic.get_model(session, model_id))


@router.delete(
    "/{model_id}",
    status_code=204,
    operation_id="delete_model",
    dependencies=[WRITES],
    responses=error_responses(NotFoundError, ConflictError),
)
def delete_model(caller: MayWriteModels, model_id: PathId, state: State) -> None:
    """Delete a model that no schedule and no job refers to."""
    logic.delete_model(state.registry, caller, state.artifacts, model_id)
