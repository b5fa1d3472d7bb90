"""The web page, which shows people what the API gives programs."""

from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, get_args

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session, joinedload

from service.access.callers import AnyCaller, Caller
from service.access.visibility import is_visible, visible_models
from service.http.errors import InvalidError
from service.http.fields import PageQuery, PathId, newest_first
from service.http.validation import FieldsError
from service.models import logic as models_logic
from service.models.logic import get_handed_in
from service.models.registrations import newest_registrations
from service.models.schemas import STATES, ModelQuery, ModelRegistrationOut
from service.registry.tables import JobState, Model, Schedule, ScheduleStatus
from service.registry.types import utc_now
from service.request_checks import get_requested_model
from service.schedules import logic as schedules_logic
from service.schedules.exporting import formats_of
from service.schedules.schemas import ScheduleQuery
from service.shared.fields import GuidanceScale, Identifier, NumSteps, Seed
from service.shared.job_requests import AnySamplerName, Prompt, Size
from service.state import State
from service.tuning_groups.logic import get_group
from service.tuning_jobs import logic as jobs_logic
from service.usage import logic as usage_logic
from service.usage.schemas import UsageQuery
from service.web import comparing, views
from service.web.rendering import render
from service.web.views import AUTO
from timetuner_core.catalog import BUILTINS, GuidanceType, sampler_names

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

STATIC = Path(__file__).parent / "static"
ROWS_ON_OVERVIEW = 8
MODELS_IN_FORM = 100
UNREADY_MODELS = 20
COMPARED_SCHEDULES = 200
MATRIX_SCHEDULES = 2000
USAGE_DAYS = 30

Query = TypeVar("Query", bound=BaseModel)


class JobsQuery(PageQuery):
    state: JobState | None = None


class TwoQuery(BaseModel):
    """Two schedules that are compared."""

    a: Identifier
    b: Identifier


class SettingQuery(BaseModel):
    """A setting that a form begins with. What is not given has the model's usual value."""

    num_steps: NumSteps | None = None
    sampler: AnySamplerName | None = None
    guidance_type: GuidanceType | None = None
    guidance_scale: GuidanceScale | None = None


class PlaygroundQuery(SettingQuery):
    """The playground's form, so that its address can be sent to somebody."""

    model: str | None = None
    schedule: Identifier | None = None
    seed: Seed = 0
    num_images: int | None = Field(None, ge=1)
    class_labels: int | None = None
    prompt: Prompt | None = None
    negative_prompt: Prompt | None = None
    height: Size | None = None
    width: Size | None = None


def read_query(request: Request, query: type[Query]) -> Query:
    """The query of a form. Browsers send fields that were left blank as empty text, which is dropped."""
    given = {name: value for name, value in request.query_params.items() if value != ""}
    try:
        return query.model_validate(given)
    except ValidationError as error:
        raise FieldsError(error, "query", query) from None


@router.get("/")
def overview(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    page = PageQuery(limit=ROWS_ON_OVERVIEW)
    with state.registry.read() as session:
        models, _ = newest_first(session, visible_models(caller), Model.id, page)
        jobs, _ = jobs_logic.newest(session, caller, None, page)
        schedules, _ = schedules_logic.listed(session, caller, ScheduleQuery(limit=ROWS_ON_OVERVIEW))
        context = {
            "models": models,
            "counts": {model.id: views.count_schedules(session, caller, model.id) for model in models},
            "jobs": jobs,
            "verdicts": views.verdicts_of(session, jobs),
            "schedules": schedules,
            "names": _names(session, (*jobs, *schedules)),
            "aliases": views.aliases_of(session, schedules),
        }
    return render(request, "overview.html", caller, builtins=BUILTINS, start=views.START_MODEL, views=views, **context)


@router.get("/models")
def models(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    query = read_query(request, ModelQuery)
    with state.registry.read() as session:
        rows, cursor = models_logic.listed(session, caller, query)
        counts = {model.id: views.count_schedules(session, caller, model.id) for model in rows}
        unready, _ = newest_registrations(session, caller, list(STATES), PageQuery(limit=UNREADY_MODELS))
        registrations = [ModelRegistrationOut.of(row) for row in unready]
    given = query.model_dump(exclude_defaults=True, exclude={"cursor", "limit"})
    context = {"models": rows, "counts": counts, "cursor": cursor, "registrations": registrations, "given": given}
    return render(request, "models.html", caller, builtins=BUILTINS, query=query, **context)


@router.get("/models/{model_id}")
def model(model_id: PathId, request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    setting = read_query(request, SettingQuery).model_dump(exclude_none=True)
    with state.registry.read() as session:
        row = get_handed_in(session, caller, model_id)
        if not isinstance(row, Model):
            return render(request, "registration.html", caller, registration=ModelRegistrationOut.of(row))
        accepted = ScheduleQuery(model=model_id, status=ScheduleStatus.ACCEPTED)
        best, _ = schedules_logic.listed(
            session, caller, accepted.model_copy(update={"sort": "score", "limit": ROWS_ON_OVERVIEW})
        )
        newest, _ = schedules_logic.listed(session, caller, accepted.model_copy(update={"limit": 1}))
        jobs, _ = jobs_logic.newest(session, caller, None, PageQuery(limit=ROWS_ON_OVERVIEW), model_id)
        context = {
            "model": row,
            "given": views.form_fields(row, newest, setting),
            "count": views.count_schedules(session, caller, model_id),
            "schedules": best,
            "pictures": views.stored_pictures(session, caller, row, best),
            "aliases": views.aliases_of(session, best),
            "of_model": schedules_logic.aliases(session, caller, model_id),
            "jobs": jobs,
            "verdicts": views.verdicts_of(session, jobs),
            "dependents": models_logic.dependents(session, caller, model_id),
            "most_named": models_logic.MAX_NAMED,
        }
    context["card"] = models_logic.card_of(state.artifacts, row)
    samplers, names = sampler_names(), {row.id: row.name}
    objectives = views.objectives_of(row)
    return render(
        request, "model.html", caller, samplers=samplers, objectives=objectives, views=views, names=names, **context
    )


@router.get("/jobs")
def jobs(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    query = read_query(request, JobsQuery)
    with state.registry.read() as session:
        rows, cursor = jobs_logic.newest(session, caller, query.state, query)
        names, verdicts = _names(session, rows), views.verdicts_of(session, rows)
    return render(
        request,
        "jobs.html",
        caller,
        jobs=rows,
        names=names,
        verdicts=verdicts,
        cursor=cursor,
        query=query,
        states=JobState,
    )


@router.get("/jobs/{job_id}")
def job(job_id: PathId, request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    with state.registry.read() as session:
        row = jobs_logic.get_job(session, caller, job_id)
        events = views.newest_events(session, row)
        context = {
            "job": row,
            "model": session.get_one(Model, row.model_id),
            "charts": views.job_charts(row, events),
            "progress": jobs_logic.progress_of(session, row),
            "log": views.job_log(events),
            "worker": views.worker_of(events),
            "verdict": views.verdicts_of(session, [row]).get(row.id),
        }
    return render(request, "job.html", caller, **context)


@router.get("/groups/{group_id}")
def group(group_id: PathId, request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    """Jobs that were submitted together."""
    with state.registry.read() as session:
        found = get_group(session, caller, group_id)
        names, verdicts = _names(session, found.jobs), views.verdicts_of(session, found.jobs)
    counts = Counter(verdicts.get(job.id, str(job.state)) for job in found.jobs)
    return render(request, "group.html", caller, group=found, names=names, verdicts=verdicts, counts=counts)


@router.get("/schedules")
def schedules(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    query = read_query(request, ScheduleQuery)
    with state.registry.read() as session:
        rows, cursor = schedules_logic.listed(session, caller, query)
        context = {
            "schedules": rows,
            "cursor": cursor,
            "names": _names(session, rows),
            "aliases": views.aliases_of(session, rows),
            "models": _choices(session, caller),
        }
    options = {"samplers": sampler_names(), "guidance_types": get_args(GuidanceType), "statuses": ScheduleStatus}
    given = query.model_dump(mode="json", exclude_defaults=True, exclude={"cursor", "limit"})
    return render(request, "schedules.html", caller, query=query, given=given, views=views, **options, **context)


@router.get("/schedules/{schedule_id}")
def schedule(schedule_id: PathId, request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    with state.registry.read() as session:
        row = schedules_logic.get_schedule(session, caller, schedule_id)
        model = session.get_one(Model, row.model_id)
        rivals = views.rivals_of(session, caller, row)
        context = {
            "rivals": rivals,
            "schedule": row,
            "model": model,
            "aliases": views.aliases_of(session, [row])[row.id],
            "charts": views.schedule_charts(row),
            "worth_chart": views.worth_chart(row, rivals),
            "formats": formats_of(model),
        }
    base_url = str(request.base_url).rstrip("/")
    return render(request, "schedule.html", caller, views=views, base_url=base_url, **context)


@router.get("/compare")
def compare(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    """Compare the newest schedules of a model that share a setting: the most common one, unless another is named."""
    asked = request.query_params
    with state.registry.read() as session:
        choices = _choices(session, caller)
        chosen = _chosen(session, caller, asked.get("model"), choices)
        query = ScheduleQuery(model=chosen.id if chosen else None, limit=COMPARED_SCHEDULES)
        rows = schedules_logic.listed(session, caller, query)[0] if chosen else []
        aliases = views.aliases_of(session, rows)
    rows = [row for row in rows if row.evaluation is not None]
    groups = [group for group, _ in Counter(map(views.group_of, rows)).most_common()]
    chosen_group = _choice("setting", asked.get("setting"), {group.value: group for group in groups})
    rows = [row for row in rows if views.group_of(row) == chosen_group]
    measured = [name for name in views.METRICS if any(views.figure(row, name) is not None for row in rows)]
    metric = _choice("metric", asked.get("metric"), {name: name for name in measured})
    context: dict[str, Any] = {"models": choices, "chosen": chosen, "groups": groups}
    context["chosen_group"] = chosen_group
    context |= {"measured": measured, "metric": metric, "aliases": aliases}
    context["schedules"] = sorted(rows, key=lambda row: (views.network_calls(row) or 0, row.score or 1.0))
    context["board"] = comparing.leaderboard(rows)
    context["chart_of"] = views.comparison_chart(rows, metric) if metric else None
    return render(request, "compare.html", caller, views=views, **context)


@router.get("/compare/schedules")
def compare_two(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    """Two schedules side by side."""
    query = read_query(request, TwoQuery)
    with state.registry.read() as session:
        a, b = (schedules_logic.get_schedule(session, caller, id) for id in (query.a, query.b))
        models = [session.get_one(Model, one.model_id) for one in (a, b)]
    both = [("first", a, models[0]), ("second", b, models[1])]
    found = {"metrics": comparing.metrics_of_both(a, b), "same": comparing.have_one_teacher(a, b)}
    return render(request, "two.html", caller, both=both, charts=comparing.charts_of_both(a, b), views=views, **found)


@router.get("/matrix")
def matrix(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    """The best schedule of each model for each number of network calls."""
    with state.registry.read() as session:
        models = _choices(session, caller)
        ids = [model.id for model in models]
        newest = select(Schedule).where(Schedule.model_id.in_(ids), is_visible(caller, Schedule))
        newest = newest.where(Schedule.status != ScheduleStatus.IMPORTED).order_by(Schedule.id.desc())
        some = newest.options(joinedload(Schedule.evaluation)).limit(MATRIX_SCHEDULES + 1)
        schedules = session.scalars(some).all()
        others = visible_models(caller).where(Model.id.not_in(ids)).limit(1)
        left_out = {"schedules": len(schedules) > MATRIX_SCHEDULES, "models": session.scalar(others) is not None}
    made = comparing.matrix(models, schedules[:MATRIX_SCHEDULES])
    most = {"schedules": MATRIX_SCHEDULES, "models": MODELS_IN_FORM}
    context = {"matrix": made, "most": most, "left_out": left_out, "comparing": comparing, "views": views}
    return render(request, "matrix.html", caller, **context)


@router.get("/usage")
def usage(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    """The use by jobs, of the latest `USAGE_DAYS` days unless others are named."""
    query = read_query(request, UsageQuery)
    today = utc_now().date()
    if query.since is None:
        last = query.until or today
        query.since = date.fromordinal(max(last.toordinal() - USAGE_DAYS + 1, 1))
    with state.registry.read() as session:
        rows, cursor = usage_logic.newest(session, caller, query)
        context = {
            "rows": rows,
            "cursor": cursor,
            "keys": usage_logic.by_key(session, caller, query),
            "chart_of_days": views.usage_chart(usage_logic.by_day(session, caller, query), today),
        }
    given = query.model_dump(mode="json", exclude_none=True, exclude={"cursor", "limit"})
    return render(request, "usage.html", caller, query=query, given=given, **context)


@router.get("/playground")
def playground(request: Request, caller: AnyCaller, state: State) -> HTMLResponse:
    """The playground. It begins with the setting that the query names, or else with one that has a schedule."""
    query = read_query(request, PlaygroundQuery)
    context: dict[str, Any] = {"given": {}, "tuned": [], "formats": {}}
    with state.registry.read() as session:
        choices = _choices(session, caller)
        chosen = _chosen(session, caller, query.model, choices)
        if chosen is not None:
            tuned = views.tuned_settings(session, caller, chosen.id)
            if query.schedule not in (None, AUTO):
                named = schedules_logic.find_for_sampling(session, caller, chosen.id, query.schedule or "", "query")
                session.refresh(named, ["evaluation"])
                tuned = [named, *(one for one in tuned if one.id != named.id)]
            given = views.form_fields(chosen, tuned, query.model_dump(exclude_none=True, exclude={"model"}))
            context = {"given": given, "tuned": tuned, "formats": formats_of(chosen)}
    samplers = sampler_names()
    return render(
        request, "playground.html", caller, models=choices, chosen=chosen, samplers=samplers, views=views, **context
    )


def _names(session: Session, rows: Any) -> dict[str, str]:
    """The names of the models of schedules or jobs."""
    query = select(Model.id, Model.name).where(Model.id.in_({row.model_id for row in rows}))
    return {row.id: row.name for row in session.execute(query)}


def _choices(session: Session, caller: Caller) -> list[Model]:
    return list(session.scalars(visible_models(caller).order_by(Model.id.desc()).limit(MODELS_IN_FORM)))


def _chosen(session: Session, caller: Caller, model_id: str | None, choices: list[Model]) -> Model | None:
    """The model that the query names, or the newest. Raises: InvalidError."""
    if model_id:
        return get_requested_model(session, caller, model_id, "query")
    return choices[0] if choices else None


def _choice(name: str, value: str | None, choices: dict[str, Any]) -> Any:
    """The choice that the query names, or the first. Raises: InvalidError."""
    if not value:
        return next(iter(choices.values()), None)
    if value not in choices:
        accepted = ", ".join(choices) or "none, as nothing was measured"
        raise InvalidError(f"{name} is {value!r}; accepted: {accepted}", ("query", name), value)
    return choices[value]


@router.get("/login")
def login(request: Request, next: str = "/") -> HTMLResponse:
    return render(request, "login.html", None, next=next)
