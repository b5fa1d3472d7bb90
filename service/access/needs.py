"""What an endpoint needs of its caller: `needs(Scope.TUNE)`, as the OpenAPI document says it, too."""

from typing import Annotated, Any

from fastapi import Request, Security
from fastapi.security import HTTPBearer, SecurityScopes

from service.access.callers import CALLER, Caller
from service.http.errors import ForbiddenError, UnauthenticatedError
from service.registry.keys import Scope

DESCRIPTION = (
    "An API key, made by `timetuner keys create`. Each operation names the scope it needs; `admin` has all. No key is "
    "needed while authentication is off."
)


class _KeyScheme(HTTPBearer):
    """The security scheme of the document. Who asks was found out by the middleware."""

    async def __call__(self, request: Request, needed: SecurityScopes) -> Caller:  # type: ignore[override]
        caller: Caller | None = request.scope.get(CALLER)
        if caller is None:
            raise UnauthenticatedError("this request has no API key")
        for scope in needed.scopes:
            if not caller.may(Scope(scope)):
                given = ", ".join(caller.key.scopes) if caller.key and caller.key.scopes else "no scope"
                raise ForbiddenError(f"this API key has {given}; accepted: one that has {scope!r}")
        return caller


_scheme = _KeyScheme(scheme_name="api_key", bearerFormat="tt_<prefix>_<secret>", description=DESCRIPTION)


def needs(*scopes: Scope) -> Any:
    """A dependency that gives the `Caller`: one with all these scopes; without any, whoever has a valid key."""
    return Security(_scheme, scopes=[str(scope) for scope in scopes])


AnyCaller = Annotated[Caller, needs()]
