"""What an endpoint needs of its caller: `needs("tune")`, as the OpenAPI document says it, too."""

from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer, SecurityScopes

from service.access.callers import CALLER, Caller
from service.errors import ForbiddenError, UnauthenticatedError
from service.registry.keys import Scope

DESCRIPTION = (
    "An API key, made by `timetuner keys create`. Each operation names the scope it needs; `admin` has all. No key is "
    "needed while authentication is off."
)
_scheme = HTTPBearer(
    scheme_name="api_key", bearerFormat="tt_<prefix>_<secret>", description=DESCRIPTION, auto_error=False
)


async def _caller(request: Request, needed: SecurityScopes, _: Annotated[Any, Depends(_scheme)]) -> Caller:
    caller: Caller | None = request.scope.get(CALLER)
    if caller is None:
        raise UnauthenticatedError("this request has no API key")
    for scope in needed.scopes:
        if not caller.may(Scope(scope)):
            given = ", ".join(caller.key.scopes) if caller.key and caller.key.scopes else "no scope"
            raise ForbiddenError(f"this API key has {given}; accepted: one that has {scope!r}")
    return caller


def needs(*scopes: Scope) -> Any:
    """A dependency that gives the `Caller`: one with all these scopes; without any, whoever has a valid key."""
    return Security(_caller, scopes=[str(scope) for scope in scopes])


AnyCaller = Annotated[Caller, needs()]
