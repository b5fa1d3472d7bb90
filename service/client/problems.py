"""Reading the service's refusals."""

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from service.client.errors import (
    MAX_SHOWN_CHARACTERS,
    ApiError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    ServerError,
    TooManyRequestsError,
    UnauthenticatedError,
)

if TYPE_CHECKING:
    import httpx


class Fault(BaseModel):
    """One thing that is wrong with a request: where, what is accepted, and what was given."""

    loc: list[str | int]
    msg: str
    input: Any = None


class Problem(BaseModel):
    """The service's refusal, an RFC 9457 problem document."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[Fault] = Field(default_factory=list)
    request_id: str | None = None


KINDS: dict[int, type[ApiError]] = {
    400: InvalidError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    406: InvalidError,
    409: ConflictError,
    413: InvalidError,
    415: InvalidError,
    422: InvalidError,
    429: TooManyRequestsError,
}


def raise_for(response: "httpx.Response") -> None:
    """Raises: ApiError, if a response that was read is a refusal."""
    if response.is_success:
        return
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:  # A proxy may have answered.
        said = " ".join(response.text.split())[:MAX_SHOWN_CHARACTERS] or response.reason_phrase
        problem = Problem(title=response.reason_phrase, status=response.status_code, detail=said)
    retry_after = response.headers.get("Retry-After", "")
    kind = _kind_of(response.status_code)
    raise kind(problem, float(retry_after) if retry_after.isdecimal() else None)


def error_of(problem: Problem) -> ApiError:
    """The error that an answer with this problem raises."""
    return _kind_of(problem.status)(problem)


def _kind_of(status: int) -> type[ApiError]:
    return KINDS.get(status, ServerError if status >= 500 else ApiError)
