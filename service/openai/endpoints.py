"""/openai/v1: OpenAI's images API, for clients that know no other."""

import time
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from service.access.callers import AnyCaller, Caller, MaySample
from service.http.errors import InvalidError, TooLargeError, UnavailableError
from service.http.fields import require_json
from service.http.validation import FieldsError
from service.openai import logic
from service.openai.schemas import ErrorBody, ImagesRequest, ImagesResponse, ModelInfo, ModelList
from service.registry.samples import Ended
from service.registry.tables import SampleJob
from service.registry.types import new_id
from service.samples.reading import cancel_job, read_images
from service.samples.serving import serve
from service.samples.state import Samples
from service.samples.submitting import Submission
from service.shared import telemetry
from service.shared.job_requests import SampleRequest
from service.state import AppState, State

PREFIX = "/openai/v1"
DESCRIPTIONS = {
    400: "A field is not accepted; `param` names it.",
    401: "There is no valid API key.",
    403: "The API key may not do this.",
    404: "There is no such model.",
    429: "Too many requests, or images that wait. Retry-After says when to try again.",
    500: "The images could not be made.",
    503: "They took too long. Retry-After says when to try again.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint that answers with these errors, in OpenAI's form."""
    return {status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses}


# Any endpoint may answer these.
ERRORS = {**errors(401, 403, 429), "default": {"model": ErrorBody, "description": "Any other error."}}

router = APIRouter(prefix=PREFIX, tags=["openai"])


@router.post(
    "/images/generations",
    operation_id="openai_generate_images",
    dependencies=[Depends(require_json)],
    responses=errors(400, 404, 500, 503),
)
async def generate_images(
    caller: MaySample, body: ImagesRequest, request: Request, response: Response, state: State, samples: Samples
) -> ImagesResponse:
    """Sample images and wait for them. A client that hangs up cancels its job.

    What takes longer than the service waits is answered 503. With a `seed` the job goes on, and the same request gets
    its images later; without one it is cancelled, as nobody could ask for the same again.
    """
    ours = await run_in_threadpool(_sample_request, state, caller, body)
    submission = Submission(new_id("smp"), ours, "image/png", telemetry.traceparent(), caller)

    def answer(job: SampleJob, end: Ended) -> ImagesResponse:
        images, output_format = read_images(state, job, end), body.output_format or "png"
        return ImagesResponse(
            created=int(time.time()),
            data=logic.encoded(images, output_format),
            output_format=output_format,
            size=logic.size_of(images),
            seed=ours.seed,
            schedule=job.schedule_id,
            flagged=end.flagged,
        )

    seconds = state.settings.max_wait_seconds
    try:
        job, images = await serve(state, samples, submission, seconds, answer, request)
    except (InvalidError, TooLargeError) as error:
        raise logic.their_error(error) from None
    if images is None:
        if body.seed is None:
            await state.run_write(cancel_job, state, caller, job.id)
        raise UnavailableError(f"the images took more than {seconds:g} seconds; accepted: the same request, later")
    response.headers["TimeTuner-Job"] = job.id
    return images


@router.get("/models", operation_id="openai_list_models")
def list_models(caller: AnyCaller, state: State) -> ModelList:
    """The models that make images, newest first."""
    with state.registry.read() as session:
        return ModelList(data=logic.list_models(session, caller))


@router.get("/models/{name:path}", operation_id="openai_get_model", responses=errors(404))
def get_model(caller: AnyCaller, name: str, state: State) -> ModelInfo:
    """One model, by its name or id."""
    with state.registry.read() as session:
        model = logic.find_model(session, caller, name)
        return logic.model_info(model, is_only=name == model.name)


def _sample_request(state: AppState, caller: Caller, body: ImagesRequest) -> SampleRequest:
    """Raises: ServiceError."""
    with state.registry.read() as session:
        model = logic.find_model(session, caller, body.model)
        try:
            return logic.sample_request(model, body)
        except ValidationError as error:
            raise FieldsError(error, "body", SampleRequest) from None
