"""Finding schedules: by id, by query, by alias, and the best one for a request."""

from collections.abc import Sequence

from sqlalchemy import Select, exists, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, joinedload

from service.errors import ConflictError, InvalidError, NotFoundError
from service.models.logic import get_model, get_requested_model
from service.registry.database import Registry
from service.registry.schedules import next_version
from service.registry.tables import SampleJob, Schedule, ScheduleAlias, ScheduleStatus
from service.requests import Setting, check_setting, check_timesteps
from service.schedules.schemas import ScheduleImport, ScheduleQuery


def get_schedule(session: Session, schedule_id: str) -> Schedule:
    """Raises: NotFoundError."""
    schedule = session.get(Schedule, schedule_id, options=[joinedload(Schedule.evaluation)])
    if schedule is None:
        raise NotFoundError(f"no schedule {schedule_id!r}")
    return schedule


def filtered(query: ScheduleQuery) -> Select[Schedule]:
    """The statement for a query's filters, newest first to come."""
    given = query.model_dump(exclude={"limit", "cursor", "model"}, exclude_none=True)
    if query.model is not None:
        given["model_id"] = query.model
    return select(Schedule).filter_by(**given).options(joinedload(Schedule.evaluation))


def resolve(session: Session, setting: Setting) -> tuple[Schedule | None, str]:
    """The best accepted schedule for exactly this setting, or None for untuned, and the reason."""
    matching = [getattr(Schedule, name) == value for name, value in setting.key().items()]
    best = session.scalar(
        select(Schedule)
        .where(*matching, Schedule.status == ScheduleStatus.ACCEPTED)
        .order_by(Schedule.score, Schedule.id.desc())
        .limit(1)
        .options(joinedload(Schedule.evaluation))
    )
    if best is not None:
        return best, f"version {best.version}: the lowest score of the accepted schedules, {best.score:.4f}"
    is_rejected = Schedule.status == ScheduleStatus.REJECTED
    rejected = session.scalar(select(func.count()).select_from(Schedule).where(*matching, is_rejected))
    return None, f"untuned: no accepted schedule for this setting ({rejected} rejected)"


def import_schedule(session: Session, request: ScheduleImport) -> Schedule:
    """Store a schedule made elsewhere as the next version of its setting. Raises: InvalidError."""
    spec = get_requested_model(session, request.model).spec
    check_setting(spec, request)
    _check_grid(request, spec["T"])
    key = request.key()
    schedule = Schedule(
        **key,
        version=next_version(session, key),
        status=ScheduleStatus.IMPORTED,
        timesteps=request.timesteps,
        t_ratios=request.t_ratios,
        provenance=request.provenance,
        evaluation=None,
    )
    session.add(schedule)
    session.flush()
    return schedule


def delete_schedule(registry: Registry, schedule_id: str) -> None:
    """Delete a schedule that no alias and no sampling job names: these say what was sampled with it.

    Raises:
        NotFoundError, ConflictError.
    """
    conflict = ConflictError(f"schedule {schedule_id!r} has aliases or samples; accepted: one without any")
    try:
        with registry.write() as session:
            schedule = get_schedule(session, schedule_id)
            for referrer in (ScheduleAlias, SampleJob):
                if session.scalar(select(exists().where(referrer.schedule_id == schedule_id))):
                    raise conflict
            session.delete(schedule)
    except IntegrityError:  # named by someone in between
        raise conflict from None


def _check_grid(request: ScheduleImport, T: float) -> None:
    """The conditions of `timetuner_core.grids`, refused with the field's name."""
    timesteps, t_ratios = request.timesteps, request.t_ratios
    check_timesteps(timesteps, request.num_steps, T)
    if len(t_ratios) != request.num_steps:
        message = f"t_ratios has {len(t_ratios)} values; accepted: {request.num_steps}"
        raise InvalidError(message, ("body", "t_ratios"))
    if not all(0 < t * t_ratio <= T * (1 + 1e-6) for t, t_ratio in zip(timesteps, t_ratios, strict=False)):
        message = f"accepted as t_ratios: any that keep t * t_ratio within (0, {T}]"
        raise InvalidError(message, ("body", "t_ratios"), t_ratios)


def find_for_sampling(session: Session, model_id: str, name: str) -> Schedule:
    """The schedule a sampling request names, by id or alias. Raises: InvalidError."""
    schedule = session.get(Schedule, name)
    if schedule is None and (alias := session.get(ScheduleAlias, (model_id, name))):
        schedule = session.get(Schedule, alias.schedule_id)
    if schedule is None or schedule.model_id != model_id:
        accepted = "'auto', 'none', or the id or alias of a schedule of this model"
        raise InvalidError(f"no schedule {name!r} for this model; accepted: {accepted}", ("body", "schedule"), name)
    return schedule


def set_alias(session: Session, model_id: str, name: str, schedule_id: str) -> ScheduleAlias:
    """Point a model's alias at one of its schedules. Raises: InvalidError."""
    schedule = session.get(Schedule, schedule_id)
    if schedule is None or schedule.model_id != model_id:
        accepted = "the id of a schedule of this model"
        raise InvalidError(f"no schedule {schedule_id!r}; accepted: {accepted}", ("body", "schedule"), schedule_id)
    return session.merge(ScheduleAlias(model_id=model_id, name=name, schedule_id=schedule_id))


def aliases(session: Session, model_id: str) -> Sequence[ScheduleAlias]:
    """A model's aliases by name. Raises: NotFoundError."""
    get_model(session, model_id)
    return session.scalars(select(ScheduleAlias).filter_by(model_id=model_id).order_by(ScheduleAlias.name)).all()


def delete_alias(session: Session, model_id: str, name: str) -> None:
    """Raises: NotFoundError."""
    alias = session.get(ScheduleAlias, (model_id, name))
    if alias is None:
        raise NotFoundError(f"no alias {name!r} of model {model_id!r}")
    session.delete(alias)
