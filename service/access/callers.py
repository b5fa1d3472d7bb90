"""Callers: who makes a request, what they may do and see, and what it costs them.

Endpoints take a caller by the scope they need, such as `caller: MayTune`; the OpenAPI document names that scope, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Request, Security
from fastapi.security import HTTPBearer, SecurityScopes
from sqlalchemy import insert
from sqlalchemy.orm import Session

from service.http.errors import ForbiddenError, InvalidError, KeyLimitError, UnauthenticatedError
from service.registry.keys import Scope, charge, is_valid
from service.registry.tables import PUBLIC, ApiKey, AuditEntry, SampleJob, TuningJob
from service.registry.types import utc_now

CALLER_IN_SCOPE = "timetuner.caller"  # The authentication middleware puts the caller into the ASGI scope by this name.
DESCRIPTION = (
    "An API key, made by `timetuner keys create`. Each operation names the scope it needs; `admin` has all. No key is "
    "needed while authentication is off."
)


@dataclass(frozen=True)
class Caller:
    """An API key. Without one: anybody on this machine while no key is needed, who may do everything."""

    key: ApiKey | None = None
    request_id: str | None = None

    @property
    def owner(self) -> str | None:
        """The owner recorded on jobs that this request creates: the API key's id, or None without a key."""
        return None if self.key is None else self.key.id

    def may(self, scope: Scope) -> bool:
        """Whether the caller's key has the scope."""
        return self.key is None or scope in self.key.scopes or Scope.ADMIN in self.key.scopes

    def sees(self, job: TuningJob | SampleJob) -> bool:
        """Whether a job is the caller's to see. Endpoints answer as if other jobs did not exist."""
        return job.owner == self.owner or self.may(Scope.ADMIN)

    def private_to(self, private: bool) -> str:
        """The `private_to` of what the caller makes. Raises: InvalidError, if it has no key to be private to."""
        if not private:
            return PUBLIC
        if self.key is None:
            detail = "private is true, but this request has no API key; accepted: false, or a request with an API key"
            raise InvalidError(detail, ("body", "private"), True)
        return self.key.id

    def is_still_valid(self, session: Session) -> bool:
        """Whether the caller's key was not revoked and has not expired since the request began."""
        return self.key is None or is_valid(session, self.key.id)

    def charge(self, session: Session, cost: int) -> None:
        """Count a cost against the key's daily quota, if it has one. Raises: KeyLimitError."""
        if self.key is not None and self.key.pixel_steps_per_day is not None:
            (left,) = charge(session, self.key.id, [cost])
            if left is not None:
                raise quota_error(self.key, cost, left)

    def record(self, session: Session, action: str, object: str, outcome: str = "done") -> None:
        """Write what was done into the audit log, in the same transaction. Without a key nothing is written."""
        record_all(session, action, [(self, object)], outcome)


def record_all(session: Session, action: str, done: Iterable[tuple[Caller, str]], outcome: str = "done") -> None:
    """Write into the audit log which callers did the same action to which objects."""
    same = {"action": action, "outcome": outcome}
    entries = [
        {**same, "actor": caller.key.id, "object": object[:255], "request_id": caller.request_id}
        for caller, object in done
        if caller.key is not None
    ]
    if entries:
        # Core's insert is faster than the ORM's, and each request for samples has an entry.
        session.connection().execute(insert(AuditEntry.__table__), entries)  # type: ignore[arg-type]


def quota_error(key: ApiKey, cost: int, left: int) -> KeyLimitError:
    """The refusal of a request that costs more than is left of its key's daily quota."""
    now = utc_now()
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    detail = (
        f"this request costs {cost} (values x steps x images x network calls); of this API key's "
        f"{key.pixel_steps_per_day} a day (pixel_steps_per_day) {left} are left; accepted: up to that, or a new try "
        "at 0:00 UTC"
    )
    return KeyLimitError(detail, (midnight - now).total_seconds())


class _KeyScheme(HTTPBearer):
    """The security scheme of the OpenAPI document. The authentication middleware has found out who calls."""

    async def __call__(self, request: Request, needed: SecurityScopes) -> Caller:  # type: ignore[override]
        caller: Caller | None = request.scope.get(CALLER_IN_SCOPE)
        if caller is None:
            raise UnauthenticatedError("this request has no API key")
        for scope in needed.scopes:
            if not caller.may(Scope(scope)):
                given = ", ".join(caller.key.scopes) if caller.key and caller.key.scopes else "no scope"
                raise ForbiddenError(f"this API key has {given}; accepted: one that has {scope!r}")
        return caller


_scheme = _KeyScheme(scheme_name="api_key", bearerFormat="tt_<prefix>_<secret>", description=DESCRIPTION)


def needs(*scopes: Scope) -> Any:
    """A dependency that gives the `Caller`. Its key must have all these scopes. Without any, a valid key is enough."""
    return Security(_scheme, scopes=[str(scope) for scope in scopes])


AnyCaller = Annotated[Caller, needs()]
MaySample = Annotated[Caller, needs(Scope.SAMPLE)]
MayTune = Annotated[Caller, needs(Scope.TUNE)]
MayWriteModels = Annotated[Caller, needs(Scope.MODELS_WRITE)]

ANYBODY = Caller()
