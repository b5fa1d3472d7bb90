"""The way of requests for samples past FastAPI's dependencies, which take a third of what the web's side takes."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.access.callers import CALLER_IN_SCOPE, Caller
from service.access.idempotency import MAX_KEY_LENGTH
from service.http.errors import InvalidError
from service.http.fields import is_json, load_json
from service.registry.keys import Scope
from service.shared.job_requests import SampleRequest

OPERATION = "sample"


class DirectRoute(APIRoute):
    """Calls the endpoint `sample` with arguments that are read here, if nothing is wrong with a request.

    Whatever is wrong, FastAPI reads the request again and refuses it. It reads the requests of other endpoints, too.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        by_fastapi = super().get_route_handler()
        if self.operation_id != OPERATION:
            return by_fastapi

        async def handle(request: Request) -> Response:
            arguments = await read_arguments(request)
            if arguments is None:
                return await by_fastapi(request)
            response: Response = await self.endpoint(**arguments)
            return response

        return handle


async def read_arguments(request: Request) -> dict[str, Any] | None:
    """The arguments of `sample`, as FastAPI would read them; None if anything is wrong with the request."""
    caller: Caller | None = request.scope.get(CALLER_IN_SCOPE)
    if caller is None or not caller.may(Scope.SAMPLE) or not is_json(request):
        return None
    headers = request.headers
    key = headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_LENGTH:
        return None
    try:
        body = SampleRequest.model_validate(load_json(await request.body()))
    except (InvalidError, ValueError):
        return None
    app_state = request.app.state
    return {
        "caller": caller,
        "body": body,
        "request": request,
        "state": app_state.timetuner,
        "samples": app_state.samples,
        "accept": headers.get("accept", "*/*"),
        "prefer": headers.get("prefer"),
        "idempotency_key": key,
    }
