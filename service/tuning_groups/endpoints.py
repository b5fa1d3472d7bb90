"""/v1/tuning-groups"""

from fastapi import APIRouter, Depends, Response

from service.access.callers import AnyCaller, MayTune
from service.access.idempotency import GivenKey
from service.http.errors import (
    ConflictError,
    InvalidError,
    NotFoundError,
    TooLargeError,
    TooManyRequestsError,
    UnsupportedMediaTypeError,
    error_responses,
)
from service.http.fields import PathId, require_json
from service.registry.tables import TuningJob
from service.shared.queue import publish
from service.state import WRITES, State
from service.tuning_groups import logic
from service.tuning_groups.schemas import TuningGroupOut, TuningGroupRequest

router = APIRouter(prefix="/v1/tuning-groups", tags=["tuning jobs"])


@router.post(
    "",
    status_code=202,
    operation_id="submit_tuning_group",
    dependencies=[Depends(require_json), WRITES],
    responses={
        200: {"model": TuningGroupOut, "description": "The price: nothing was queued."},
        **error_responses(ConflictError, TooLargeError, UnsupportedMediaTypeError, InvalidError, TooManyRequestsError),
    },
)
def submit_tuning_group(
    caller: MayTune, body: TuningGroupRequest, state: State, response: Response, idempotency_key: GivenKey = None
) -> TuningGroupOut:
    """Queue several tuning jobs, or none of them; or, with `dry_run`, only check and price them."""
    if body.dry_run:
        response.status_code = 200
        return TuningGroupOut.model_validate(logic.dry_run(state.registry, state.settings, caller, body))
    group, created = logic.submit(state.registry, state.settings, caller, body, idempotency_key)
    if created:
        publish(state.celery, state.registry, TuningJob, [job.id for job in group.jobs])
    response.headers["Location"] = f"/v1/tuning-groups/{group.id}"
    return TuningGroupOut.model_validate(group)


@router.get("/{group_id}", operation_id="get_tuning_group", responses=error_responses(NotFoundError))
def get_tuning_group(caller: AnyCaller, group_id: PathId, state: State) -> TuningGroupOut:
    """The tuning jobs that were submitted together, as one."""
    with state.registry.read() as session:
        return TuningGroupOut.model_validate(logic.get_group(session, caller, group_id))
