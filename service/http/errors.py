"""The errors of the service, and how they become RFC 9457 problem documents."""

import json
import math
from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.http.validation import FieldsError, close_match, describe, printable
from service.shared.logs import request_id
from service.shared.sampler_facts import SamplersUnknownError

Location = tuple[str | int, ...]
MAX_SHOWN_PATH = 200
EXAMPLE_REQUEST_ID = "req_01JD3K5V8Q2M4N6P7R9S0T1V2W"


class ErrorItem(BaseModel):
    """One fault: where it is, what is accepted, and what was given."""

    loc: list[str | int]
    msg: str
    input: Any = None


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[ErrorItem] = []
    request_id: str | None = None


class ServiceError(Exception):
    """A request that cannot be served, and why. `loc` names the field, such as `("body", "num_steps")`."""

    status = HTTPStatus.BAD_REQUEST
    example = "the body is not JSON"  # The OpenAPI document shows this as an example of a detail.
    headers: Mapping[str, str] = {}

    def __init__(self, detail: str, loc: Location | None = None, input: Any = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = [] if loc is None else [ErrorItem(loc=list(loc), msg=detail, input=input)]

    def problem(self, request_id: str | None) -> Problem:
        """The problem document that this error is answered with."""
        title = self.status.phrase
        return Problem(title=title, status=self.status, detail=self.detail, errors=self.errors, request_id=request_id)


class UnauthenticatedError(ServiceError):
    """A request without a valid API key, where one is needed; `why` does not repeat what was given."""

    status = HTTPStatus.UNAUTHORIZED
    example = "this request has no API key; accepted: 'Authorization: Bearer tt_...', a valid API key"
    headers = {"WWW-Authenticate": "Bearer"}  # noqa: RUF012

    def __init__(self, why: str) -> None:
        super().__init__(
            f"{why}; accepted: 'Authorization: Bearer tt_...', a valid API key", ("header", "Authorization")
        )


class ForbiddenError(ServiceError):
    status = HTTPStatus.FORBIDDEN
    example = "this API key has sample; accepted: one that has 'tune'"


class NotFoundError(ServiceError):
    status = HTTPStatus.NOT_FOUND
    example = "no model 'mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W'; accepted: an id that GET /v1/models lists"


class NotAcceptableError(ServiceError):
    status = HTTPStatus.NOT_ACCEPTABLE
    example = "Accept is 'text/html'; accepted: image/png, application/zip, application/x-npy, application/json"


class ConflictError(ServiceError):
    status = HTTPStatus.CONFLICT
    example = (
        "model 'mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W' is used by schedule 'sch_01JD3K5V8Q2M4N6P7R9S0T1V2W'; "
        "accepted: cascade=true deletes them, too"
    )


class TooLargeError(ServiceError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    example = "the body has over 1048576 bytes; accepted: up to 1048576 bytes"


class UnsupportedMediaTypeError(ServiceError):
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    example = "Content-Type is 'text/plain'; accepted: application/json"


class InvalidError(ServiceError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    example = "num_steps is 2000; accepted: 1 to 1000, the steps this model was trained on"


class TooManyRequestsError(ServiceError):
    status = HTTPStatus.TOO_MANY_REQUESTS
    example = "1000 jobs are queued; accepted: fewer than 1000"
    headers = {"Retry-After": "10"}  # noqa: RUF012


class KeyLimitError(TooManyRequestsError):
    """An API key has used all that it may for now; in `seconds` it may use more."""

    def __init__(self, detail: str, seconds: float) -> None:
        super().__init__(detail)
        self.headers = {"Retry-After": str(max(1, math.ceil(seconds)))}


class JobFailedError(ServiceError):
    """A synchronous request whose job failed on the worker."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    example = "sampling job 'smp_01JD3K5V8Q2M4N6P7R9S0T1V2W' has failed: its images are not finite"


class ImagesLostError(ServiceError):
    """The stored images of a job were damaged. The job is queued again."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    example = "the images of sampling job 'smp_01JD3K5V8Q2M4N6P7R9S0T1V2W' were damaged, and are sampled again"
    headers = {"Retry-After": "2"}  # noqa: RUF012


class UnavailableError(ServiceError):
    """Something that a request needs cannot be had now."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    example = "the export took more than 120 seconds; accepted: the same request, later"
    headers = {"Retry-After": "10"}  # noqa: RUF012


class NotInstalledError(ServiceError):
    """A request that needs a package which this installation lacks."""

    status = HTTPStatus.NOT_IMPLEMENTED
    example = (
        "this API has no PyTorch; accepted as format: json, card; the others, where timetuner[diffusers] is installed"
    )


class StoreFullError(ServiceError):
    """The results of a request have no room under the operator's limit."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    example = (
        "6291456 bytes are needed, and 1072693248 of MAX_STORED_BYTES=1073741824 are taken; accepted: up to 1048576 "
        "bytes, or more once samples or models are deleted (they are counted every minute)"
    )


class DeadlineError(ServiceError):
    """A request whose deadline passed before a worker was free."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    example = "sampling job 'smp_01JD3K5V8Q2M4N6P7R9S0T1V2W' has failed: no worker was free before its deadline"


def problem_response(
    status: int, detail: str, errors: list[ErrorItem] | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    title = HTTPStatus(status).phrase
    problem = Problem(title=title, status=status, detail=detail, errors=errors or [], request_id=request_id())
    # The JSON is ASCII only, because an offending input may hold half a surrogate pair, which UTF-8 cannot encode.
    content = json.dumps(problem.model_dump(), allow_nan=False)
    return Response(content, status, headers=headers, media_type="application/problem+json")


def install_error_handlers(app: FastAPI, routes: Collection[APIRoute]) -> None:
    """Answer every known error, those of the framework included, with a problem document.

    `RequestIdMiddleware` answers unknown errors.
    """

    def methods_at(request: Request) -> set[str]:
        path = next((route.path for route in routes if route.matches(request.scope)[0] != Match.NONE), None)
        return {name for route in routes if route.path == path for name in route.methods or ()}

    @app.exception_handler(ServiceError)
    def service_error(_request: Request, error: ServiceError) -> Response:
        return problem_response(error.status, error.detail, error.errors, error.headers)

    @app.exception_handler(RequestValidationError)
    def validation_error(request: Request, error: RequestValidationError) -> Response:
        models = error.models if isinstance(error, FieldsError) else _models_of(request.scope.get("route"))
        items = [
            ErrorItem(loc=list(fault.loc), msg=fault.message, input=printable(fault.given))
            for fault in describe(error.errors(), error.body, models)
        ]
        detail = "; ".join(f"{'.'.join(map(str, item.loc))}: {item.msg}" for item in items)
        return problem_response(HTTPStatus.UNPROCESSABLE_ENTITY, detail, items)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> Response:
        headers, detail = error.headers, str(error.detail)
        path = request.scope["path"][:MAX_SHOWN_PATH]
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and (methods := methods_at(request)):
            # The framework names the methods of one route only, so name those of all routes of the path.
            headers = {"Allow": ", ".join(sorted(methods))}
            detail = f"{request.method} is not possible at {path!r}; accepted: {headers['Allow']}"
        elif error.status_code == HTTPStatus.NOT_FOUND and detail == HTTPStatus.NOT_FOUND.phrase:
            meant = close_match(path, [route.path for route in routes])
            hint = f"did you mean {meant!r}? " if meant else ""
            detail = f"there is nothing at {path!r}; {hint}accepted: the paths that /docs lists"
        return problem_response(error.status_code, detail, headers=headers)

    @app.exception_handler(SamplersUnknownError)
    def samplers_unknown(_request: Request, error: SamplersUnknownError) -> Response:
        detail = f"{error}; accepted: the same request, later"
        return problem_response(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": "10"})

    @app.exception_handler(IntegrityError)
    def changed_meanwhile(_request: Request, _error: IntegrityError) -> Response:
        detail = "what this request refers to was changed or deleted by another at the same time; accepted: a new try"
        return problem_response(HTTPStatus.CONFLICT, detail)


def error_responses(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint that may answer with these errors, for the OpenAPI document."""
    return {int(error.status): {"description": error.status.phrase, **problem_content(error)} for error in errors}


def problem_content(error: type[ServiceError] = ServiceError) -> dict[str, Any]:
    """How the OpenAPI document says that a response is a problem document."""
    example = Problem(
        title=error.status.phrase, status=error.status, detail=error.example, request_id=EXAMPLE_REQUEST_ID
    )
    content = {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example.model_dump(mode="json")}
    return {"content": {"application/problem+json": content}}


def _models_of(route: Any) -> dict[str, Any]:
    """The types that a route's body and query are validated by."""
    if not isinstance(route, APIRoute):
        return {}
    fields = {"body": route.body_field, "query": next(iter(route.dependant.query_params), None)}
    return {place: field.field_info.annotation for place, field in fields.items() if field is not None}
