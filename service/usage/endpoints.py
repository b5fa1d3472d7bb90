"""/v1/usage"""

from fastapi import APIRouter

from service.access.callers import AnyCaller
from service.http.errors import InvalidError, error_responses
from service.state import State
from service.usage import logic
from service.usage.schemas import UsageFilters, UsagePage

router = APIRouter(prefix="/v1/usage", tags=["usage"])


@router.get("", operation_id="list_usage", responses=error_responses(InvalidError))
def list_usage(caller: AnyCaller, state: State, query: UsageFilters) -> UsagePage:
    """The use by jobs that ended, by day, API key, model and kind: the caller's own, of an admin everybody's."""
    with state.registry.read() as session:
        items, cursor = logic.newest(session, caller, query)
        return UsagePage(items=items, next_cursor=cursor)
