"""Finding schedules: by id, by query, by alias, and the best one for a request."""

from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, bindparam, case, exists, func, literal, or_, select, true, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased, joinedload

from service.access.callers import Caller
from service.access.visibility import hidden_models, is_visible, realms, visible_model, visible_schedule
from service.http.errors import ConflictError, InvalidError, NotFoundError
from service.models.logic import get_model
from service.registry.database import Registry
from service.registry.schedules import next_version
from service.registry.tables import IS_GUIDANCE_INTERVAL, Model, SampleJob, Schedule, ScheduleAlias, ScheduleStatus
from service.request_checks import check_timesteps, get_requested_model, settled
from service.schedules.schemas import ScheduleImport, ScheduleQuery
from service.shared.job_requests import OWN_SAMPLER, SamplingSetting
from service.shared.pipeline_calls import INTERVAL, SIZES, covers, covers_value
from service.shared.sampler_facts import sampler_facts

MAX_SCANNED = 10_000  # One page of a list looks at no more schedules than that.
MAX_COUNTED = 100
RESERVED_ALIASES = ("auto", "none")


def get_schedule(session: Session, caller: Caller, schedule_id: str) -> Schedule:
    """A schedule that the caller sees, and its evaluation. Raises: NotFoundError."""
    found = session.get(Schedule, schedule_id, options=[joinedload(Schedule.evaluation)])
    schedule = visible_schedule(session, caller, found)
    if schedule is None:
        raise NotFoundError(f"no schedule {schedule_id!r}; accepted: an id that GET /v1/schedules lists")
    return schedule


def listed(session: Session, caller: Caller, query: ScheduleQuery) -> tuple[Sequence[Schedule], str | None]:
    """One page of the schedules that the caller sees and that match every filter given, and the cursor of the next.

    They come by falling id, or by rising score.

    However few match, at most `MAX_SCANNED` entries of one index are looked at. So a page before the last may have
    fewer than `limit` rows, or none.

    Raises: InvalidError.
    """
    given = query.model_dump(exclude={"limit", "cursor", "model", "search", "sort"}, exclude_none=True)
    if query.model is not None:
        given["model_id"] = query.model
    listed_by = Schedule.RANKED_BY if query.sort == "score" else Schedule.LISTED_BY
    indexed = next(names for names in listed_by if given.keys() >= set(names))
    others = [name for name in given if name not in indexed]
    order = (Schedule.score, Schedule.id) if query.sort == "score" else (Schedule.id.desc(),)
    scan = select(Schedule.id).filter_by(**{name: given[name] for name in indexed}).order_by(*order)
    # What is hidden is left out here, so that no cursor names it.
    scan = scan.where(Schedule.model_id.not_in(hidden_models(caller)), is_visible(caller, Schedule))
    if query.sort == "score":
        scan = scan.where(Schedule.score.is_not(None))
    if query.cursor is not None:
        scan = scan.where(_is_after(session, caller, query.cursor, query.sort))

    # The inner limit keeps query planners from using other filters than the indexed ones. The outer query keeps the
    # order; if it ordered again, SQLite would sort, and so never stop early.
    is_filtered = bool(others) or query.search is not None
    names = [*others, *(["model_id"] if query.search is not None and "model_id" not in others else [])]
    scanned = scan.add_columns(*(getattr(Schedule, name) for name in names))
    row = scanned.limit(MAX_SCANNED if is_filtered else query.limit + 1).subquery().c
    matching = select(row.id).where(*(row[name] == given[name] for name in others))
    if query.search is not None:
        matching = matching.where(_is_named(row.id, row.model_id, query.search))
    ids = session.scalars(matching.limit(query.limit + 1)).all()
    rows = session.scalars(
        select(Schedule)
        .where(Schedule.id.in_(ids[: query.limit]))
        .order_by(*order)
        .options(joinedload(Schedule.evaluation))
    ).all()
    if len(ids) > query.limit:
        return rows, ids[query.limit - 1]
    return rows, session.scalar(scan.offset(MAX_SCANNED - 1).limit(1)) if is_filtered else None


def _is_after(session: Session, caller: Caller, cursor: str, sort: str) -> ColumnElement[bool]:
    """Whether a schedule comes after the one that a cursor names. Raises: InvalidError."""
    if sort != "score":
        return Schedule.id < cursor
    last = visible_schedule(session, caller, session.get(Schedule, cursor))
    if last is None or last.score is None:
        message = f"no schedule {cursor!r} with a score; accepted: the next_cursor of the page before"
        raise InvalidError(message, ("query", "cursor"), cursor)
    return tuple_(Schedule.score, Schedule.id) > tuple_(literal(last.score), literal(last.id))


def _is_named(id: ColumnElement[str], model_id: ColumnElement[str], text: str) -> ColumnElement[bool]:
    """Whether a text is a part of a schedule's id, of one of its aliases, or of its model's name."""
    models = select(Model.id).where(Model.name.icontains(text, autoescape=True))
    aliased_ids = select(ScheduleAlias.schedule_id).where(ScheduleAlias.name.icontains(text, autoescape=True))
    return or_(id.icontains(text, autoescape=True), model_id.in_(models), id.in_(aliased_ids))


def resolve(session: Session, caller: Caller, setting: SamplingSetting) -> tuple[Schedule | None, str]:
    """The best accepted schedule for exactly this setting, or for sizes that hold its own; or None, and the reason.

    Where there is none, the best for an interval of guidance scales that holds the setting's own is taken. It is one
    of the public schedules and of those that are private to the caller's own key, for admins, too.
    """
    of_any_sampler = setting.sampler == OWN_SAMPLER
    key = setting.key()
    call_keys = [key["call_key"], *_intervals(session, caller, setting, key)]
    found = [
        session.execute(_best(of_any_sampler), key | {"private_to": private_to, "call_key": call_key}).one()
        for private_to in realms(caller)
        for call_key in call_keys
    ]
    accepted = [schedule for schedule, _ in found if schedule is not None]
    num_rejected = sum(count for _, count in found)
    if accepted:
        lowest = min(schedule.score or 0.0 for schedule in accepted)
        schedule = max((one for one in accepted if one.score == lowest), key=lambda one: one.id)
        return schedule, f"version {schedule.version}: the lowest score of the accepted schedules, {schedule.score:.4f}"
    if (of_interval := _of_guidance_interval(session, caller, setting, key)) is not None:
        scales = _shown(of_interval.guidance_scales)
        which = f"the accepted schedules for intervals that hold guidance_scale {setting.guidance_scale:g}"
        reason = f"version {of_interval.version} for guidance_scale {scales}: the lowest score of {which}"
        return of_interval, f"{reason}, {of_interval.score:.4f}"
    counted = f"{num_rejected}" if num_rejected <= MAX_COUNTED else f"more than {MAX_COUNTED}"
    return None, f"untuned: no accepted schedule for this setting ({counted} rejected)"


def _intervals(session: Session, caller: Caller, setting: SamplingSetting, key: dict[str, Any]) -> list[str]:
    """The call keys of accepted schedules for intervals of sizes that hold those of a setting with this key."""
    deciding = setting.deciding()
    if not all(isinstance(deciding.get(name), int) for name in SIZES):
        return []
    free = ("call_key", "sampler") if setting.sampler == OWN_SAMPLER else ("call_key",)
    fixed = {name: value for name, value in key.items() if name not in free}
    query = select(func.min(Schedule.id)).filter_by(**fixed, status=ScheduleStatus.ACCEPTED)
    query = query.where(Schedule.private_to.in_(realms(caller)), Schedule.call_key.startswith(INTERVAL))
    one_of_each = query.group_by(Schedule.call_key).limit(MAX_COUNTED)
    schedules = session.scalars(select(Schedule).where(Schedule.id.in_(one_of_each)))
    return [schedule.call_key for schedule in schedules if covers(schedule.call or {}, deciding)]


def _of_guidance_interval(
    session: Session, caller: Caller, setting: SamplingSetting, key: dict[str, Any]
) -> Schedule | None:
    """The best accepted schedule for an interval of guidance scales that holds that of a setting with this key."""
    deciding = setting.deciding()
    left_out = {"guidance_scale", "guidance_scale_high", "call_key"}
    left_out |= {"sampler"} if setting.sampler == OWN_SAMPLER else set()
    fixed = {name: value for name, value in key.items() if name not in left_out}
    of_setting = select(Schedule).filter_by(**fixed, status=ScheduleStatus.ACCEPTED)
    holding = of_setting.where(
        IS_GUIDANCE_INTERVAL,
        Schedule.guidance_scale <= setting.guidance_scale,
        Schedule.guidance_scale_high >= setting.guidance_scale,
        Schedule.private_to.in_(realms(caller)),
    )
    best_first = holding.order_by(Schedule.score, Schedule.id.desc()).options(joinedload(Schedule.evaluation))
    found = session.scalars(best_first.limit(MAX_COUNTED))
    return next((schedule for schedule in found if covers(schedule.call or {}, deciding)), None)


def mismatch(session: Session, caller: Caller, setting: SamplingSetting) -> str:
    """The fields that do not match of the accepted schedule that is nearest to a setting; empty if there is none."""
    query = select(Schedule).where(Schedule.model_id == setting.model, Schedule.status == ScheduleStatus.ACCEPTED)
    newest_first = query.where(is_visible(caller, Schedule)).order_by(Schedule.id.desc()).limit(MAX_COUNTED)
    wanted = _matched(setting.key(), setting.deciding())
    if setting.sampler == OWN_SAMPLER:
        del wanted["sampler"]
    nearest: tuple[str, list[str]] | None = None
    for schedule in session.scalars(newest_first):
        tuned = _matched({name: getattr(schedule, name) for name in Schedule.KEY}, schedule.call or {})
        names = [name for name in {**wanted, **tuned} if name in wanted or name not in Schedule.KEY]
        different = [
            f"{name} is {_shown(wanted.get(name))}, tuned for {_shown(tuned.get(name))}"
            for name in names
            if not covers_value(tuned.get(name), wanted.get(name))
        ]
        if different and (nearest is None or len(different) < len(nearest[1])):
            nearest = schedule.id, different
    return "" if nearest is None else f"; the nearest, {nearest[0]}, does not match: {', '.join(nearest[1])}"


def _matched(key: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """The fields by which schedules are found, the arguments of the call in place of their digest."""
    left_out = ("model_id", "call_key", "guidance_scale_high")
    of_key = {name: value for name, value in key.items() if name not in left_out}
    if high := key["guidance_scale_high"]:
        of_key["guidance_scale"] = [key["guidance_scale"], high]
    return of_key | {name if name in SIZES else f"call.{name}": value for name, value in call.items()}


def _shown(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(each, Decimal) for each in value):
        return " to ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, Decimal | float) else "not given" if value is None else f"{value}"


@cache  # Making the statement takes longer than running it.
def _best(of_any_sampler: bool) -> Select[Schedule | None, int]:
    """One row for a setting's key and a `private_to`: the best accepted schedule, or None, and how many were rejected.

    They are counted only where none was accepted.
    The best has the lowest score, and is the newest of equals. Rejected schedules are counted no further than needed.

    It is one query. Each part reads one end of a range of `ix_schedules_resolve`, however many versions there are.
    """
    names = [name for name in (*Schedule.KEY, "private_to") if not (of_any_sampler and name == "sampler")]
    of_setting = [getattr(Schedule, name) == bindparam(name) for name in names]
    is_accepted = and_(*of_setting, Schedule.status == ScheduleStatus.ACCEPTED)
    lowest = select(func.min(Schedule.score)).where(is_accepted).scalar_subquery()
    accepted = select(Schedule).where(is_accepted, Schedule.score == lowest).order_by(Schedule.id.desc()).limit(1)
    best = aliased(Schedule, accepted.subquery())
    is_rejected = and_(*of_setting, Schedule.status == ScheduleStatus.REJECTED)
    rejected = select(Schedule.id).where(is_rejected).limit(MAX_COUNTED + 1).subquery()
    num_rejected = select(func.count()).select_from(rejected).scalar_subquery()
    one_row = select(literal(1).label("one")).subquery()
    query = select(best, case((best.id.is_(None), num_rejected), else_=0)).select_from(one_row.outerjoin(best, true()))
    return query.options(joinedload(best.evaluation))


def import_schedule(session: Session, caller: Caller, request: ScheduleImport) -> Schedule:
    """Store a schedule made elsewhere as the next version of its setting.

    Raises:
        InvalidError.
        ConflictError: it was made for a model of another content, and `override` is not set.
    """
    model = get_requested_model(session, caller, request.model)
    spec = model.spec
    if request.model_content_hash not in (None, model.content_hash) and not request.override:
        own = f"that of {model.name!r} is {model.content_hash!r}"
        message = f"model_content_hash is {request.model_content_hash!r}, and {own}"
        accepted = "a schedule of the same model, or override=true"
        raise ConflictError(
            f"{message}; accepted: {accepted}", ("body", "model_content_hash"), request.model_content_hash
        )
    request = settled(spec, request, "ddim", is_run=False)
    _check_grid(request, spec["T"], spec.get("t_min", 0.0))  # Models registered by older versions have no t_min.
    _check_table(request)
    key, private_to = request.key(), caller.private_to(request.private)
    schedule = Schedule(
        **key,
        owner=caller.owner,
        private_to=private_to,
        version=next_version(session, key, private_to),
        status=ScheduleStatus.IMPORTED,
        timesteps=request.timesteps,
        t_ratios=request.t_ratios,
        solver_table=None if request.solver_table is None else request.solver_table.model_dump(exclude_none=True),
        call=request.deciding() or None,
        provenance=request.provenance,
        evaluation=None,
    )
    session.add(schedule)
    session.flush()
    return schedule


def delete_schedule(registry: Registry, caller: Caller, schedule_id: str) -> None:
    """Delete a schedule that no alias and no sampling job names, because these tell how their samples were made.

    Raises:
        NotFoundError, ConflictError.
    """
    conflict = ConflictError(f"schedule {schedule_id!r} has aliases or samples; accepted: one without any")
    try:
        with registry.write() as session:
            schedule = get_schedule(session, caller, schedule_id)
            for referrer in (ScheduleAlias, SampleJob):
                if session.scalar(select(exists().where(referrer.schedule_id == schedule_id))):
                    raise conflict
            session.delete(schedule)
            caller.record(session, "delete_schedule", schedule_id)
    except IntegrityError:  # Another request named the schedule meanwhile.
        raise conflict from None


def _check_grid(request: ScheduleImport, T: float, t_min: float) -> None:
    """Check the conditions of `timetuner_core.grids`, and name the field that does not meet them."""
    timesteps, t_ratios = request.timesteps, request.t_ratios
    check_timesteps(timesteps, request.num_steps, T)
    if len(t_ratios) != request.num_steps:
        message = f"t_ratios has {len(t_ratios)} values; accepted: {request.num_steps}"
        raise InvalidError(message, ("body", "t_ratios"))
    if not all(0 < t * t_ratio <= T * (1 + 1e-6) for t, t_ratio in zip(timesteps, t_ratios, strict=False)):
        message = f"accepted as t_ratios: any that keep t * t_ratio within (0, {T}]"
        raise InvalidError(message, ("body", "t_ratios"), t_ratios)
    if any(t * t_ratio < min(t, t_min) * (1 - 1e-6) for t, t_ratio in zip(timesteps, t_ratios, strict=False)):
        message = f"accepted as t_ratios: any that keep t * t_ratio at {t_min} or above, the network's first time"
        raise InvalidError(message, ("body", "t_ratios"), t_ratios)


def _check_table(request: ScheduleImport) -> None:
    """Refuse a learned solver of other network calls than the grid's, or for a sampler that is no such table."""
    table = request.solver_table
    if table is None:
        return
    facts = sampler_facts(request.sampler)
    if not facts.is_table:
        message = "accepted, with a solver_table: a sampler without noise"
        raise InvalidError(f"sampler is {request.sampler!r}; {message}", ("body", "sampler"), request.sampler)
    num_calls = facts.network_calls(request.timesteps)
    for name, values in (("a", table.a), ("times", table.times), ("eps", table.eps)):
        if values is not None and len(values) != num_calls:
            message = f"solver_table.{name} has {len(values)} values; accepted: {num_calls}, one per network call"
            raise InvalidError(message, ("body", "solver_table", name))
    lengths = [len(row) for row in table.b]
    if lengths != list(range(1, num_calls + 1)):
        message = f"solver_table.b has rows of {lengths} values; accepted: {num_calls} rows, of 1, 2 and so on"
        raise InvalidError(message, ("body", "solver_table", "b"))
    if accepted := facts.accepted_call_times(table.times, request.timesteps):
        message = f"solver_table.times is {table.times}; accepted for {request.sampler!r}: {accepted}"
        raise InvalidError(message, ("body", "solver_table", "times"), table.times)
    if request.eta != 0:
        message = f"eta is {request.eta}; accepted, with a solver_table: 0"
        raise InvalidError(message, ("body", "eta"), float(request.eta))


def find_for_sampling(session: Session, caller: Caller, model_id: str, name: str, where: str = "body") -> Schedule:
    """The schedule that a sampling request's body or query names, by id or alias. Raises: InvalidError."""
    schedule = session.get(Schedule, name)
    if schedule is None and (alias := session.get(ScheduleAlias, (model_id, name))):
        schedule = session.get(Schedule, alias.schedule_id)
    schedule = visible_schedule(session, caller, schedule)
    if schedule is None or schedule.model_id != model_id:
        accepted = "'auto', 'none', or the id or alias of a schedule of this model"
        raise InvalidError(f"no schedule {name!r} for this model; accepted: {accepted}", (where, "schedule"), name)
    return schedule


def set_alias(session: Session, caller: Caller, model_id: str, name: str, schedule_id: str) -> ScheduleAlias:
    """Point a model's alias at one of its schedules. Raises: InvalidError."""
    if name in RESERVED_ALIASES:
        raise InvalidError(f"name is {name!r}; accepted: any but {RESERVED_ALIASES}", ("path", "name"), name)
    model, schedule = get_model(session, caller, model_id), session.get(Schedule, schedule_id)
    schedule = visible_schedule(session, caller, schedule)
    if schedule is None or schedule.model_id != model_id:
        accepted = "the id of a schedule of this model"
        raise InvalidError(f"no schedule {schedule_id!r}; accepted: {accepted}", ("body", "schedule"), schedule_id)
    if schedule.private and not model.private:
        message = f"schedule {schedule_id!r} is private, and everybody sees the names of this model's schedules"
        raise InvalidError(f"{message}; accepted: one that is not private", ("body", "schedule"), schedule_id)
    return session.merge(ScheduleAlias(model_id=model_id, name=name, schedule_id=schedule_id))


def aliases(session: Session, caller: Caller, model_id: str) -> Sequence[ScheduleAlias]:
    """A model's aliases by name. Raises: NotFoundError."""
    get_model(session, caller, model_id)
    return session.scalars(select(ScheduleAlias).filter_by(model_id=model_id).order_by(ScheduleAlias.name)).all()


def delete_alias(session: Session, caller: Caller, model_id: str, name: str) -> None:
    """Delete a model's alias. Raises: NotFoundError."""
    alias = session.get(ScheduleAlias, (model_id, name))
    if alias is None or visible_model(session, caller, model_id) is None:
        raise NotFoundError(
            f"no alias {name!r} of model {model_id!r}; accepted: one that GET /v1/models/{model_id}/aliases lists"
        )
    session.delete(alias)
