"""Finding schedules: by id, by query, by alias, and the best one for a request."""

from decimal import Decimal

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session, joinedload

from service.errors import InvalidError, NotFoundError
from service.registry.tables import Schedule, ScheduleAlias, ScheduleStatus
from service.schedules.schemas import ScheduleQuery


def normal_guidance_scale(guidance_type: str, guidance_scale: Decimal) -> Decimal:
    """Unconditional sampling has no scale: stored and looked up as 1, whatever was said."""
    return Decimal(1) if guidance_type == "uncond" else guidance_scale


def get_schedule(session: Session, schedule_id: str) -> Schedule:
    """Raises: NotFoundError."""
    schedule = session.get(Schedule, schedule_id, options=[joinedload(Schedule.evaluation)])
    if schedule is None:
        raise NotFoundError(f"no schedule {schedule_id!r}")
    return schedule


def filtered(query: ScheduleQuery) -> Select[Schedule]:
    """The statement for a query's filters, newest first to come."""
    columns = {
        Schedule.model_id: query.model,
        Schedule.sampler: query.sampler,
        Schedule.num_steps: query.num_steps,
        Schedule.guidance_type: query.guidance_type,
        Schedule.guidance_scale: query.guidance_scale,
        Schedule.eta: query.eta,
        Schedule.status: query.status,
    }
    conditions = [column == value for column, value in columns.items() if value is not None]
    return select(Schedule).where(*conditions).options(joinedload(Schedule.evaluation))


def resolve(
    session: Session,
    model_id: str,
    sampler: str,
    num_steps: int,
    guidance_type: str,
    guidance_scale: Decimal,
    eta: Decimal,
) -> tuple[Schedule | None, str]:
    """The best accepted schedule for exactly this setting, or None for untuned, and the reason."""
    matching = (
        Schedule.model_id == model_id,
        Schedule.sampler == sampler,
        Schedule.num_steps == num_steps,
        Schedule.guidance_type == guidance_type,
        Schedule.guidance_scale == normal_guidance_scale(guidance_type, guidance_scale),
        Schedule.eta == eta,
    )
    best = session.scalar(
        select(Schedule)
        .where(*matching, Schedule.status == ScheduleStatus.ACCEPTED)
        .order_by(Schedule.score, Schedule.id.desc())
        .limit(1)
        .options(joinedload(Schedule.evaluation))
    )
    if best is not None:
        return best, f"version {best.version}: the lowest score of the accepted schedules, {best.score:.4f}"
    rejected = session.scalar(select(func.count()).select_from(Schedule).where(*matching))
    return None, f"untuned: no accepted schedule for this setting ({rejected} rejected)"


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
