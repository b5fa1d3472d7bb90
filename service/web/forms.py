"""The web page's forms. They call the same functions as the API, and then lead to a page."""

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.access.callers import Caller, MayTune, MayWriteModels, needs
from service.access.cookies import COOKIE, check_same_origin
from service.access.state import Access
from service.http.errors import InvalidError, TooLargeError, UnauthenticatedError
from service.http.fields import PathId
from service.models import logic as models_logic
from service.models.schemas import BuiltinModelRequest, ModelName
from service.registry.keys import Scope
from service.registry.tables import TuningJob
from service.schedules import logic as schedules_logic
from service.schedules.schemas import ALIAS
from service.shared.fields import GuidanceScale, Identifier, NumSteps
from service.shared.job_requests import ClippingText, HeightAndWidth, SamplerName, TuningJobRequest
from service.shared.queue import publish
from service.state import WRITES, State
from service.tuning_groups import logic as groups_logic
from service.tuning_groups.schemas import MAX_JOBS, TuningGroupRequest
from service.tuning_jobs import logic as jobs_logic
from service.web.rendering import render, see
from service.web.views import DEFAULT_OBJECTIVE, OBJECTIVES, START_MODEL, USUAL_NUM_STEPS
from timetuner_core.catalog import GuidanceType


async def _same_origin(request: Request) -> None:
    check_same_origin(request.headers)


# Browsers drop tabs and line breaks from a URL and read a backslash as a slash, so each of them can hide a second
# slash, behind which the name of another host would stand.
OWN_PATH = r"/(?![/\\])[^\\\x00-\x20\x7f]*"

router = APIRouter(include_in_schema=False, dependencies=[Depends(_same_origin)])


def _split(values: Any) -> Any:
    """The numbers of a field such as `4, 6, 8`."""
    parts = [part.strip() for value in values for part in str(value).split(",")]
    return list(dict.fromkeys(parts))


def _sizes(text: Any) -> list[list[int]]:
    """The sizes of a field such as `768x1024, 1024x768`, each as [height, width]. Raises: ValueError."""
    parts = [part.strip() for part in str(text).split(",") if part.strip()]
    matches = [re.fullmatch(r"(\d{1,9})\s*[x×]\s*(\d{1,9})", part) for part in parts]
    if not all(matches):
        raise ValueError("accepted: HEIGHTxWIDTH, or several with commas between, such as 768x1024, 1024x768")
    return [[int(match[1]), int(match[2])] for match in matches if match]


class TuningForm(BaseModel):
    """Tuning jobs of a few fields: one for each number of steps and tuner. All other fields have their defaults."""

    model_config = ConfigDict(extra="forbid")

    model: Identifier
    num_steps: Annotated[list[NumSteps], BeforeValidator(_split)]
    sampler: SamplerName = "ddim"
    clipping: Annotated[ClippingText | None, BeforeValidator(lambda text: text or None)] = None
    guidance_type: GuidanceType = "uncond"
    guidance_scale: GuidanceScale = Field(1, validate_default=True)
    guidance_scale_high: Annotated[GuidanceScale | None, BeforeValidator(lambda text: text or None)] = None
    sizes: Annotated[list[HeightAndWidth], BeforeValidator(_sizes)] = []
    private: bool = False
    objective: list[Literal[tuple(DEFAULT_OBJECTIVE | OBJECTIVES)]] = [""]  # type: ignore[valid-type]

    def requests(self) -> list[TuningJobRequest]:
        """The jobs that the form asks for."""
        setting = self.model_dump(exclude={"num_steps", "objective", "guidance_scale_high", "sizes"})
        if self.guidance_scale_high is not None:
            setting["guidance_scales"] = [self.guidance_scale, self.guidance_scale_high]
        if len(self.sizes) == 1:
            setting["height"], setting["width"] = self.sizes[0]
        elif self.sizes:
            setting["sizes"] = self.sizes
        tuners = [{"tuner": {"objective": name}} if name else {} for name in dict.fromkeys(self.objective or [""])]
        return [
            TuningJobRequest.model_validate(setting | {"num_steps": steps} | tuner)
            for steps in self.num_steps
            for tuner in tuners
        ]

    def group(self) -> TuningGroupRequest:
        """Raises: InvalidError, if there are too many."""
        jobs = self.requests()
        if len(jobs) > MAX_JOBS:
            message = f"these are {len(jobs)} jobs; accepted: up to {MAX_JOBS}"
            raise InvalidError(message, ("body", "num_steps"), self.num_steps)
        return TuningGroupRequest(jobs=jobs)


@router.post("/models", dependencies=[WRITES])
def register(
    form: Annotated[BuiltinModelRequest, Form()], caller: MayWriteModels, state: State, request: Request
) -> Response:
    model, _ = models_logic.register_builtin(state.registry, caller, form.builtin, form.name, private=form.private)
    return see(request, f"/models/{model.id}")


@router.post("/start", dependencies=[WRITES])
def start(caller: Annotated[Caller, needs(Scope.MODELS_WRITE, Scope.TUNE)], state: State, request: Request) -> Response:
    """Register the bundled model and tune it."""
    model, _ = models_logic.register_builtin(state.registry, caller, START_MODEL, None, private=False)
    return _submit_one(state, caller, TuningJobRequest(model=model.id, num_steps=USUAL_NUM_STEPS), request)


def _submit_one(state: State, caller: Caller, tuning: TuningJobRequest, request: Request) -> Response:
    job, _ = jobs_logic.submit(state.registry, state.settings, caller, tuning, None)
    publish(state.celery, state.registry, TuningJob, [job.id])
    return see(request, f"/jobs/{job.id}")


@router.post("/models/{model_id}/rename", dependencies=[WRITES])
def rename_model(
    model_id: PathId, form: Annotated[ModelName, Form()], caller: MayWriteModels, state: State, request: Request
) -> Response:
    models_logic.rename_model(state.registry, caller, model_id, form.name)
    return see(request, f"/models/{model_id}")


@router.post("/models/{model_id}/delete", dependencies=[WRITES])
def delete_model(
    model_id: PathId,
    caller: MayWriteModels,
    state: State,
    request: Request,
    cascade: Annotated[bool, Form()] = False,
) -> Response:
    models_logic.delete_model(state.registry, caller, state.artifacts, model_id, cascade)
    return see(request, "/models")


@router.post("/jobs", dependencies=[WRITES])
def submit(form: Annotated[TuningForm, Form()], caller: MayTune, state: State, request: Request) -> Response:
    """One job, or a group of several."""
    asked = form.group()
    if len(asked.jobs) == 1:
        return _submit_one(state, caller, asked.jobs[0], request)
    group, _ = groups_logic.submit(state.registry, state.settings, caller, asked, None)
    publish(state.celery, state.registry, TuningJob, [job.id for job in group.jobs])
    return see(request, f"/groups/{group.id}")


@router.post("/jobs/price", dependencies=[WRITES])
def price(form: Annotated[TuningForm, Form()], caller: MayTune, state: State, request: Request) -> Response:
    """What the jobs of the form would cost, or why they would be refused, as a part of a page."""
    asked, found, refusal = form.group(), None, None
    try:
        found = groups_logic.dry_run(state.registry, state.settings, caller, asked)
    except (InvalidError, TooLargeError) as error:
        refusal = error.detail.removeprefix("jobs[0]: ") if len(asked.jobs) == 1 else error.detail
    return render(request, "price.html", caller, price=found, refusal=refusal, count=len(asked.jobs))


@router.post("/jobs/{job_id}/cancel", dependencies=[WRITES])
def cancel(job_id: PathId, caller: MayTune, state: State, request: Request) -> Response:
    jobs_logic.cancel(state.registry, caller, job_id)
    return see(request, f"/jobs/{job_id}")


@router.post("/schedules/{schedule_id}/aliases", dependencies=[WRITES])
def set_alias(
    schedule_id: PathId,
    name: Annotated[str, Form(pattern=ALIAS)],
    caller: MayWriteModels,
    state: State,
    request: Request,
) -> Response:
    with state.registry.write() as session:
        schedule = schedules_logic.get_schedule(session, caller, schedule_id)
        schedules_logic.set_alias(session, caller, schedule.model_id, name, schedule_id)
        caller.record(session, "set_alias", f"{schedule.model_id}/{name}")
    return see(request, f"/schedules/{schedule_id}")


@router.post("/schedules/{schedule_id}/aliases/delete", dependencies=[WRITES])
def delete_alias(
    schedule_id: PathId, name: Annotated[Identifier, Form()], caller: MayWriteModels, state: State, request: Request
) -> Response:
    with state.registry.write() as session:
        schedule = schedules_logic.get_schedule(session, caller, schedule_id)
        schedules_logic.delete_alias(session, caller, schedule.model_id, name)
        caller.record(session, "delete_alias", f"{schedule.model_id}/{name}")
    return see(request, f"/schedules/{schedule_id}")


@router.post("/login")
async def log_in(
    key: Annotated[str, Form(max_length=200)],
    access: Access,
    request: Request,
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """Keep a valid key in a cookie until the browser is closed."""
    try:
        await access.keys.find(f"Bearer {key.strip()}")
    except UnauthenticatedError:
        detail = "this is no valid API key; accepted: tt_..., as `timetuner keys create` printed it"
        raise InvalidError(detail, ("body", "key")) from None
    answer = see(request, next if re.fullmatch(OWN_PATH, next) else "/")
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, key.strip(), httponly=True, samesite="strict", secure=secure)
    return answer


@router.post("/logout")
async def log_out(request: Request) -> Response:
    answer = see(request, "/login")
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer
