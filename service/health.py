"""/healthz, /readyz and /metrics"""

from contextlib import suppress
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from sqlalchemy import text

from service.access.callers import needs
from service.http.errors import ForbiddenError, TooManyRequestsError, UnauthenticatedError, error_responses
from service.shared.queue import QUEUES
from service.state import AppState, State

router = APIRouter(tags=["health"])

REPLY_SECONDS = 1.0  # A worker that replies later than that is not there.
NO_KEY_NEEDED: dict[str, Any] = {"security": []}
PROBE = Field(examples=["ok"])
METRICS = {"schema": {"type": "string", "examples": ['timetuner_queue_jobs{kind="tuning"} 2.0\n']}}


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The state of each part: `ok`, or its fault."""

    ready: bool
    database: str = PROBE
    broker: str = PROBE
    workers: str = PROBE


@router.get("/healthz", operation_id="health", openapi_extra=NO_KEY_NEEDED, responses=error_responses(ForbiddenError))
async def healthz() -> Health:
    """Whether this process answers. It needs no thread and no database."""
    return Health()


@router.get(
    "/readyz",
    operation_id="readiness",
    openapi_extra=NO_KEY_NEEDED,
    responses={503: {"model": Readiness, "description": "Not ready."}, **error_responses(ForbiddenError)},
)
def readyz(state: State, response: Response) -> Readiness:
    """Whether requests can be served: database and broker reachable, a worker for each queue or one that is started."""
    database = _database(state)
    broker, workers = _broker_and_workers(state)
    ready = database == broker == workers == "ok"
    response.status_code = 200 if ready else 503
    return Readiness(ready=ready, database=database, broker=broker, workers=workers)


@router.get(
    "/metrics",
    operation_id="metrics",
    dependencies=[needs()],
    response_class=Response,
    responses={
        200: {"description": "Prometheus's text format.", "content": {"text/plain": METRICS}},
        **error_responses(UnauthenticatedError, ForbiddenError, TooManyRequestsError),
    },
)
def metrics(request: Request) -> Response:
    """This process's metrics, and the queues as they are at the moment."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _database(state: AppState) -> str:
    try:
        with state.registry.read() as session:
            session.execute(text("SELECT 1"))
    except Exception as error:  # Database drivers have errors of their own.
        return f"unreachable ({type(error).__name__})"
    return "ok"


def _broker_and_workers(state: AppState) -> tuple[str, str]:
    """The states of the broker and of the workers. The answer comes with the reply of the last queue that is needed."""
    needed = set(QUEUES) - set(state.settings.on_demand_queues)
    served: set[str] = set()

    def note(reply: dict[str, list[dict[str, Any]]]) -> None:
        served.update(queue["name"] for queues in reply.values() for queue in queues)
        if needed <= served:
            raise _AllServed

    control = state.celery.control
    try:
        # The broker may have been restarted, so the check uses a new connection.
        with state.celery.connection_for_write() as connection, suppress(_AllServed):
            control.inspect(timeout=REPLY_SECONDS, connection=connection, callback=note).active_queues()
    except Exception as error:  # Transports have errors of their own.
        return f"unreachable ({type(error).__name__})", "unknown"
    finally:
        control.mailbox.unclaimed.clear()  # Replies to earlier checks that came after their end would stay there.
    missing = [queue for queue in QUEUES if queue in needed - served]
    return "ok", f"none for {', '.join(missing)}" if missing else "ok"


class _AllServed(Exception):  # noqa: N818 (it ends a wait, and is no error)
    """Each queue has a worker, so no further reply is waited for."""
