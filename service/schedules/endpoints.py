"""/v1/schedules, and the aliases of a model's schedules."""

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from service.access.callers import AnyCaller, MayWriteModels
from service.access.idempotency import GivenKey, Once, make_once
from service.http.errors import (
    ConflictError,
    InvalidError,
    NotFoundError,
    NotInstalledError,
    UnavailableError,
    UnsupportedMediaTypeError,
    error_responses,
)
from service.http.fields import JSON_TYPE, PathId, require_json
from service.models.logic import get_model
from service.registry.tables import Schedule
from service.request_checks import get_requested_model, settled
from service.schedules import logic
from service.schedules.exporting import export, read_subject
from service.schedules.schemas import (
    ALIAS,
    AliasList,
    AliasOut,
    AliasRequest,
    ExportOptions,
    Resolution,
    ResolveParams,
    ScheduleFilters,
    ScheduleImport,
    ScheduleOut,
    SchedulePage,
)
from service.shared.job_requests import OWN_SAMPLER
from service.state import WRITES, State
from timetuner_core.exports.formats import FORMATS

router = APIRouter(tags=["schedules"])

FILES = {
    name: {"schema": {"type": "object"} if name == JSON_TYPE else {"type": "string", "format": "binary"}}
    for name in dict.fromkeys(each.media_type.partition(";")[0] for each in FORMATS.values())
}

AliasName = Annotated[str, Path(pattern=ALIAS, description="Such as `production`.")]


@router.get("/v1/schedules", operation_id="list_schedules", responses=error_responses(InvalidError))
def list_schedules(caller: AnyCaller, state: State, query: ScheduleFilters) -> SchedulePage:
    """Stored schedules that match every filter given, newest first: all that are not private, and the caller's own."""
    with state.registry.read() as session:
        rows, cursor = logic.listed(session, caller, query)
        return SchedulePage(items=[ScheduleOut.model_validate(row) for row in rows], next_cursor=cursor)


@router.post(
    "/v1/schedules",
    status_code=201,
    operation_id="import_schedule",
    dependencies=[Depends(require_json), WRITES],
    responses=error_responses(InvalidError, ConflictError, UnsupportedMediaTypeError),
)
def import_schedule(
    caller: MayWriteModels, body: ScheduleImport, state: State, response: Response, idempotency_key: GivenKey = None
) -> ScheduleOut:
    """Store a schedule made elsewhere, to sample with by id or alias; `auto` goes by evaluations, so it skips it."""
    once = Once.of(caller, "import_schedule", idempotency_key, body.model_dump_json())

    def make(session: Session) -> Schedule:
        schedule = logic.import_schedule(session, caller, body)
        caller.record(session, "import_schedule", schedule.id)
        return schedule

    schedule, _ = make_once(state.registry, once, lambda session, made: logic.get_schedule(session, caller, made), make)
    response.headers["Location"] = f"/v1/schedules/{schedule.id}"
    return ScheduleOut.model_validate(schedule)


@router.get(
    "/v1/schedules/resolve",
    operation_id="resolve_schedule",
    responses=error_responses(InvalidError),
)
def resolve_schedule(caller: AnyCaller, state: State, query: ResolveParams) -> Resolution:
    """The schedule that sampling with `schedule: "auto"` would use, and why."""
    with state.registry.read() as session:
        spec = get_requested_model(session, caller, query.model, where="query").spec
        setting = settled(spec, query, OWN_SAMPLER, where="query", is_run=False)
        schedule, reason = logic.resolve(session, caller, setting)
        if schedule is None:
            reason += logic.mismatch(session, caller, setting)
        return Resolution(schedule=schedule and ScheduleOut.model_validate(schedule), reason=reason)


@router.get(
    "/v1/schedules/{schedule_id}",
    operation_id="get_schedule",
    responses=error_responses(NotFoundError),
)
def get_schedule(caller: AnyCaller, schedule_id: PathId, state: State) -> ScheduleOut:
    """One schedule, with its evaluation."""
    with state.registry.read() as session:
        return ScheduleOut.model_validate(logic.get_schedule(session, caller, schedule_id))


@router.get(
    "/v1/schedules/{schedule_id}/export",
    operation_id="export_schedule",
    response_class=Response,
    responses={
        200: {
            "description": "A file. `TimeTuner-Not-Carried` is a JSON list of what it cannot carry.",
            "content": FILES,
        },
        **error_responses(NotFoundError, InvalidError, NotInstalledError, UnavailableError),
    },
)
async def export_schedule(caller: AnyCaller, schedule_id: PathId, state: State, query: ExportOptions) -> Response:
    """A schedule for other programs: diffusers, ComfyUI, stable-diffusion.cpp, or a registry that imports it."""
    subject = await run_in_threadpool(read_subject, state, caller, schedule_id)
    exported = await export(state, subject, query)
    chosen = FORMATS[query.format]
    headers = {
        "Content-Disposition": f'attachment; filename="{schedule_id}{chosen.ending}"',
        "TimeTuner-Not-Carried": json.dumps(exported.not_carried),
    }
    return Response(exported.content, headers=headers, media_type=chosen.media_type)


@router.delete(
    "/v1/schedules/{schedule_id}",
    status_code=204,
    operation_id="delete_schedule",
    dependencies=[WRITES],
    responses=error_responses(NotFoundError, ConflictError),
)
def delete_schedule(caller: MayWriteModels, schedule_id: PathId, state: State) -> None:
    """Delete a schedule that no alias and no sampling job names."""
    logic.delete_schedule(state.registry, caller, schedule_id)


@router.get(
    "/v1/models/{model_id}/aliases",
    operation_id="list_aliases",
    responses=error_responses(NotFoundError, ConflictError),
)
def list_aliases(caller: AnyCaller, model_id: PathId, state: State) -> AliasList:
    """The names given to a model's schedules."""
    with state.registry.read() as session:
        return AliasList(items=[AliasOut.model_validate(alias) for alias in logic.aliases(session, caller, model_id)])


@router.put(
    "/v1/models/{model_id}/aliases/{name}",
    operation_id="set_alias",
    dependencies=[Depends(require_json), WRITES],
    responses=error_responses(NotFoundError, ConflictError, InvalidError, UnsupportedMediaTypeError),
)
def set_alias(caller: MayWriteModels, model_id: PathId, name: AliasName, body: AliasRequest, state: State) -> AliasOut:
    """Give one of a model's schedules a name, or move the name to another one."""
    with state.registry.write() as session:
        get_model(session, caller, model_id)
        caller.record(session, "set_alias", f"{model_id}/{name}")
        return AliasOut.model_validate(logic.set_alias(session, caller, model_id, name, body.schedule))


@router.delete(
    "/v1/models/{model_id}/aliases/{name}",
    status_code=204,
    operation_id="delete_alias",
    dependencies=[WRITES],
    responses=error_responses(NotFoundError),
)
def delete_alias(caller: MayWriteModels, model_id: PathId, name: AliasName, state: State) -> None:
    """Take a name away from its schedule."""
    with state.registry.write() as session:
        logic.delete_alias(session, caller, model_id, name)
        caller.record(session, "delete_alias", f"{model_id}/{name}")
