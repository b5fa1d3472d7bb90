"""/v1/models"""

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeAlias, cast, get_args

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from service.access.callers import AnyCaller, Caller, MayWriteModels
from service.access.idempotency import GivenKey
from service.http.errors import (
    ConflictError,
    InvalidError,
    JobFailedError,
    NotFoundError,
    StoreFullError,
    TooLargeError,
    UnsupportedMediaTypeError,
    error_responses,
)
from service.http.fields import JSON_TYPE, PathId, check_fields, require_json
from service.http.preferences import Prefer, read_preference
from service.http.validation import FieldsError
from service.models import logic
from service.models.archive import Kind
from service.models.registrations import newest_registrations
from service.models.schemas import (
    DTYPE,
    PRIVATE_MODEL,
    STATES,
    BuiltinModelRequest,
    Dtype,
    HubModelRequest,
    ModelName,
    ModelOut,
    ModelPage,
    ModelQuery,
    ModelRegistrationOut,
    ModelRegistrationPage,
    ModelState,
    PathModelRequest,
)
from service.registry.tables import Model, ModelRegistration
from service.shared.fields import PRINTABLE
from service.state import WRITES, AppState, State

router = APIRouter(prefix="/v1/models", tags=["models"])

MULTIPART = "multipart/form-data"
BOOLEANS = {"true": True, "false": False}
FORM_FIELDS = ("archive", "name", "private", "kind", "dtype")
KIND = "What the archive is read as. `auto`: a pipeline, if it is a whole one that takes prompts; else a network."
UPLOADS = CapacityLimiter(2)  # Two archives are unpacked at once. Others wait without a thread.
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON_TYPE: {
                "schema": {
                    "anyOf": [
                        {"$ref": f"#/components/schemas/{request.__name__}"}
                        for request in (BuiltinModelRequest, PathModelRequest, HubModelRequest)
                    ]
                },
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
                        "private": {"type": "string", "enum": [*BOOLEANS], "description": PRIVATE_MODEL},
                        "kind": {"type": "string", "enum": get_args(Kind), "default": "auto", "description": KIND},
                        "dtype": {"type": "string", "enum": get_args(Dtype), "default": "auto", "description": DTYPE},
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


class Upload(NamedTuple):
    """An uploaded archive.

    Attributes:
        asked_name: the name that the request gives, if it gives one.
    """

    archive: UploadFile
    name: str
    asked_name: str | None
    private: bool
    kind: Kind
    dtype: str


JsonRequest: TypeAlias = BuiltinModelRequest | PathModelRequest | HubModelRequest


async def _parse(request: Request) -> JsonRequest | Upload:
    """The body, by its content type."""
    given = request.headers.get("content-type", "")
    content_type = given.partition(";")[0].strip().lower()
    if content_type == JSON_TYPE:
        content = await _json(request)
        given_fields = content.keys() if isinstance(content, dict) else set()
        kinds: dict[str, type[JsonRequest]] = {"path": PathModelRequest, "hub": HubModelRequest}
        schema = next((kind for field, kind in kinds.items() if field in given_fields), BuiltinModelRequest)
        try:
            parsed = schema.model_validate_json(await request.body())
        except ValidationError as error:
            raise FieldsError(error, "body", schema, content) from None
        check_fields(await request.body())
        return parsed
    if content_type != MULTIPART:
        accepted = f"{JSON_TYPE} for a built-in model, a path or a hub's name, {MULTIPART} for an archive"
        raise UnsupportedMediaTypeError(
            f"Content-Type is {given!r}; accepted: {accepted}", ("header", "Content-Type"), given
        )
    form = await request.form(max_files=1, max_fields=10)
    archive, name = form.get("archive"), form.get("name")
    if not isinstance(archive, UploadFile):
        raise InvalidError("archive is missing; accepted: a zip, tar or tar.gz file", ("body", "archive"))
    if unknown := form.keys() - set(FORM_FIELDS):
        field = min(unknown)[:100]
        raise InvalidError(f"there is no field {field!r}; accepted: {', '.join(FORM_FIELDS)}", ("body", field))
    asked_name = name if isinstance(name, str) and name else None
    name = asked_name or archive.filename or "model"
    if len(name) > 200 or not re.fullmatch(PRINTABLE, name):
        raise InvalidError("accepted as name: up to 200 printable characters", ("body", "name"), name[:300])
    private = _choice(form, "private", "false", tuple(BOOLEANS))
    kind, dtype = _choice(form, "kind", "auto", get_args(Kind)), _choice(form, "dtype", "auto", get_args(Dtype))
    return Upload(archive, name, asked_name, BOOLEANS[private], cast(Kind, kind), dtype)


def _choice(form: FormData, field: str, default: str, accepted: tuple[str, ...]) -> str:
    """A field with a few accepted values. Raises: InvalidError."""
    value = form.get(field, default)
    if not isinstance(value, str) or value not in accepted:
        given = value if isinstance(value, str) else "a file"
        message = f"{field} is {given[:100]!r}; accepted: {', '.join(accepted[:-1])} or {accepted[-1]}"
        raise InvalidError(message, ("body", field), given[:100])
    return value


@router.post(
    "",
    status_code=201,
    operation_id="register_model",
    openapi_extra=REQUEST_BODY,
    responses={
        200: {"model": ModelOut, "description": "The same content was registered before."},
        202: {"model": ModelRegistrationOut, "description": "Accepted; follow its `Location`."},
        **error_responses(
            UnsupportedMediaTypeError,
            TooLargeError,
            InvalidError,
            NotFoundError,
            ConflictError,
            JobFailedError,
            StoreFullError,
        ),
    },
)
async def register_model(
    caller: MayWriteModels,  # It comes first, so that the scope is checked before the body is read.
    parsed: Annotated[JsonRequest | Upload, Depends(_parse)],
    state: State,
    response: Response,
    prefer: Prefer = None,
    idempotency_key: GivenKey = None,
) -> ModelOut | ModelRegistrationOut:
    """Register a model: a built-in one by name, or an uploaded archive of a diffusers-format folder.

    A whole pipeline may stay where it is, too: below the operator's `MODELS_DIR`, or in the Hugging Face cache. An
    archive is a pipeline if it has a `model_index.json`, all components that are named there, and a text encoder with
    its tokenizer; else it is a network with its scheduler, as before.

    A worker loads and tries the model, which the request waits for. With `Prefer: respond-async`, or if that
    takes long, the answer is 202 with the registration's state; its `Location` gives the model once it is `ready`, or
    the problem if it is `refused`.
    """
    if isinstance(parsed, BuiltinModelRequest):
        register = partial(logic.register_builtin, state.registry, caller, parsed.builtin, parsed.name)
        model, created = await state.run_write(register, idempotency_key, parsed.private)
        return _registered(response, model, created, parsed.name)
    if isinstance(parsed, Upload):
        archive, name, asked_name, private, kind, dtype = parsed
        hand_in = partial(
            logic.hand_in_archive, state.registry, caller, state.artifacts, archive.file, name, state.settings
        )
        handed_in = await to_thread.run_sync(hand_in, idempotency_key, private, kind, dtype, limiter=UPLOADS)
    else:
        asked_name = parsed.name
        handed_in = await state.run_write(
            logic.hand_in_folder, state.registry, caller, parsed, state.settings, idempotency_key
        )
    respond_async, seconds = read_preference(prefer, state.settings.max_wait_seconds)
    found = await _described(state, caller, handed_in.found, 0 if respond_async else seconds)
    if handed_in.once is not None:
        await state.run_write(logic.remember, state.registry, caller, handed_in.once, found)
    if isinstance(found, Model):
        created = handed_in.is_new and found.id == handed_in.found.id
        return _registered(response, found, created, asked_name, handed_in.ignored_files)
    response.status_code = 202
    response.headers["Location"] = f"/v1/models/{found.id}"
    if respond_async:
        response.headers["Preference-Applied"] = "respond-async"
    return ModelRegistrationOut.of(found).model_copy(update={"ignored_files": handed_in.ignored_files})


def _registered(
    response: Response,
    model: Model,
    created: bool,
    asked_name: str | None,
    ignored_files: Sequence[str] | None = None,
) -> ModelOut:
    """The answer with a model. It names the files that nothing reads of the archive which came with this request.

    Raises:
        ConflictError: the content is registered under another name than the one that was asked for.
    """
    if asked_name is not None and model.name != asked_name:
        accepted = "no name, or that one; or DELETE it first"
        message = f"name is {asked_name!r}, but this content is model {model.id!r}, named {model.name!r}"
        raise ConflictError(f"{message}; accepted: {accepted}", ("body", "name"), asked_name)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/models/{model.id}"
    answer = ModelOut.model_validate(model)
    return answer if ignored_files is None else answer.model_copy(update={"ignored_files": ignored_files})


async def _described(
    state: AppState, caller: Caller, found: Model | ModelRegistration, seconds: float
) -> Model | ModelRegistration:
    """The model that a worker makes of a registration, or the registration after `seconds`."""
    if isinstance(found, Model):
        return found
    await run_in_threadpool(state.bus.announce_models)
    return await logic.wait_for_model(state, caller, found.id, seconds)


@router.get("", operation_id="list_models", responses=error_responses(InvalidError))
def list_models(
    caller: AnyCaller,
    state: State,
    query: Annotated[ModelQuery, Query()],
    model_state: Annotated[
        ModelState,
        Query(alias="state", description="`ready` lists models; another state lists models that are not ready."),
    ] = "ready",
) -> ModelPage | ModelRegistrationPage:
    """The registered models, newest first; or the models that were handed in and wait, or were refused.

    Private ones are listed for the key that registered them, and for an admin.
    """
    if model_state != "ready" and query.model_fields_set & {"search", "sort"}:
        message = f"search or sort is given, and state is {model_state!r}; accepted with them: state 'ready'"
        raise InvalidError(message, ("query", "state"), model_state)
    with state.registry.read() as session:
        if model_state == "ready":
            models, cursor = logic.listed(session, caller, query)
            return ModelPage(items=[ModelOut.model_validate(row) for row in models], next_cursor=cursor)
        states = [job_state for job_state, shown in STATES.items() if shown == model_state]
        rows, cursor = newest_registrations(session, caller, states, query)
        return ModelRegistrationPage(items=[ModelRegistrationOut.of(row) for row in rows], next_cursor=cursor)


@router.get("/{model_id}", operation_id="get_model", responses=error_responses(NotFoundError))
def get_model(caller: AnyCaller, model_id: PathId, state: State) -> ModelOut | ModelRegistrationOut:
    """One model; or what became so far of one that was handed in: its `state`, and its `problem` if it was refused."""
    with state.registry.read() as session:
        found = logic.get_handed_in(session, caller, model_id)
        return ModelOut.model_validate(found) if isinstance(found, Model) else ModelRegistrationOut.of(found)


@router.patch(
    "/{model_id}",
    operation_id="rename_model",
    dependencies=[Depends(require_json), WRITES],
    responses=error_responses(NotFoundError, ConflictError, InvalidError, UnsupportedMediaTypeError),
)
def rename_model(caller: MayWriteModels, model_id: PathId, body: ModelName, state: State) -> ModelOut:
    """Give a model that is ready another name. Its id stays the same."""
    return ModelOut.model_validate(logic.rename_model(state.registry, caller, model_id, body.name))


@router.delete(
    "/{model_id}",
    status_code=204,
    operation_id="delete_model",
    dependencies=[WRITES],
    responses=error_responses(NotFoundError, ConflictError),
)
def delete_model(
    caller: MayWriteModels,
    model_id: PathId,
    state: State,
    cascade: Annotated[bool, Query(description="Delete its schedules and their aliases, too.")] = False,
) -> None:
    """Delete a model and its files, or one that was refused.

    It is refused while jobs use the model that are not over, and, without `cascade`, while it has schedules; 409 names
    them. Jobs that are over and stored samples remain.
    """
    logic.delete_model(state.registry, caller, state.artifacts, model_id, cascade)
