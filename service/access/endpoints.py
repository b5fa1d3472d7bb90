"""/v1/audit"""

from fastapi import APIRouter
from sqlalchemy import select

from service.access.callers import needs
from service.access.schemas import AuditEntryOut, AuditPage
from service.http.errors import InvalidError, error_responses
from service.http.fields import PageParams, newest_first
from service.registry.keys import Scope
from service.registry.tables import AuditEntry
from service.state import State

router = APIRouter(prefix="/v1/audit", tags=["audit"])


@router.get("", operation_id="list_audit", dependencies=[needs(Scope.ADMIN)], responses=error_responses(InvalidError))
def list_audit(state: State, page: PageParams) -> AuditPage:
    """List who changed what, or was refused to, newest first. Entries are made while requests need API keys."""
    with state.registry.read() as session:
        rows, cursor = newest_first(session, select(AuditEntry), AuditEntry.id, page)
        return AuditPage(items=[AuditEntryOut.model_validate(row) for row in rows], next_cursor=cursor)
