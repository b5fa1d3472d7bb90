"""Submitting and reading tuning jobs as one group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session, joinedload

from service.access.callers import Caller
from service.access.idempotency import Once, make_once
from service.access.visibility import is_seen_job
from service.http.errors import NotFoundError, ServiceError
from service.registry.database import Registry
from service.registry.tables import FINAL_STATES, JobState, TuningJob
from service.registry.types import new_id
from service.request_checks import get_requested_model
from service.shared.settings import Settings
from service.tuning_groups.schemas import TuningGroupRequest
from service.tuning_jobs.logic import add_job, price

PACED_JOBS = 20


@dataclass
class TuningGroup:
    """The jobs of a group, in the order in which they were submitted; see `TuningGroupOut` for the other fields."""

    id: str
    jobs: Sequence[TuningJob]
    cost: int | None = None
    seconds: float | None = None

    @property
    def progress(self) -> float:
        return sum(job.progress for job in self.jobs) / len(self.jobs)

    @property
    def is_over(self) -> bool:
        return all(job.state in FINAL_STATES for job in self.jobs)


@dataclass(frozen=True)
class Price:
    """The cost of a group: samples put through the network, and seconds of one worker where they can be told."""

    cost: int
    seconds: float | None
    id: None = None
    progress: float = 0.0
    is_over: bool = False
    jobs: tuple[()] = ()


def dry_run(registry: Registry, settings: Settings, caller: Caller, request: TuningGroupRequest) -> Price:
    """Check and price the jobs of a group. Raises: InvalidError, TooLargeError, naming the job."""
    costs = []
    with registry.read() as session:
        for number, member in enumerate(request.jobs):
            with _naming_member(number):
                model = get_requested_model(session, caller, member.model)
                costs.append((model.id, price(member, model.spec, settings)))
        return Price(sum(cost for _, cost in costs), _seconds(session, caller, costs))


def submit(
    registry: Registry, settings: Settings, caller: Caller, request: TuningGroupRequest, idempotency_key: str | None
) -> tuple[TuningGroup, bool]:
    """Check and store all jobs in one transaction, or find what the same request with this key made before.

    Returns:
        The group, and whether it was made now.

    Raises:
        InvalidError, TooLargeError, TooManyRequestsError: a job was refused, and none is stored. The location names it.
        KeyLimitError: the jobs together cost more than is left of the API key's quota.
        ConflictError: the key was used with another request.
    """
    once = Once.of(caller, "submit_tuning_group", idempotency_key, request.model_dump_json())

    def find(session: Session, group_id: str) -> TuningGroup:
        return get_group(session, caller, group_id)

    def make(session: Session) -> TuningGroup:
        group_id, jobs, quota, costs = new_id("grp"), [], 0, []
        ids = sorted(new_id("job") for _ in request.jobs)  # Jobs are read in the order of their ids.
        for number, (job_id, member) in enumerate(zip(ids, request.jobs, strict=True)):
            with _naming_member(number):
                job, cost, charged = add_job(session, settings, caller, member, id=job_id, group_id=group_id)
            costs.append((job.model_id, cost))
            jobs.append(job)
            quota += charged
        caller.charge(session, quota)
        caller.record(session, "submit_tuning_group", group_id)
        return TuningGroup(group_id, jobs, sum(cost for _, cost in costs), _seconds(session, caller, costs))

    return make_once(registry, once, find, make)


def get_group(session: Session, caller: Caller, group_id: str) -> TuningGroup:
    """A group whose jobs the caller sees. Raises: NotFoundError."""
    query = select(TuningJob).where(TuningJob.group_id == group_id).order_by(TuningJob.id)
    jobs = [job for job in session.scalars(query.options(joinedload(TuningJob.schedule))) if caller.sees(job)]
    if not jobs:
        accepted = "the id that POST /v1/tuning-groups answered, as tuning jobs have it in `group`"
        raise NotFoundError(f"no tuning group {group_id!r}; accepted: {accepted}")
    return TuningGroup(group_id, jobs)


def _seconds(session: Session, caller: Caller, costs: Sequence[tuple[str, int]]) -> float | None:
    """The time of the costs of models' jobs, or None if the caller has no earlier job on one of the models."""
    paces = {model_id: _pace(session, caller, model_id) for model_id, _ in costs}
    times = [cost * pace for model_id, cost in costs if (pace := paces[model_id]) is not None]
    return sum(times) if len(times) == len(costs) else None


def _pace(session: Session, caller: Caller, model_id: str) -> float | None:
    """Seconds per sample put through the network, over the newest jobs on a model that the caller sees."""
    newest = select(TuningJob.tuning_seconds, TuningJob.network_calls).where(
        TuningJob.model_id == model_id,
        TuningJob.state == JobState.SUCCEEDED,
        TuningJob.network_calls > 0,
        is_seen_job(caller, TuningJob),
    )
    row = newest.order_by(TuningJob.id.desc()).limit(PACED_JOBS).subquery().c
    seconds, samples = session.execute(select(func.sum(row.tuning_seconds), func.sum(row.network_calls))).one()
    return seconds / samples if samples else None


@contextmanager
def _naming_member(number: int) -> Iterator[None]:
    """Put the number of the job into the location and the text of a refusal."""
    try:
        yield
    except ServiceError as error:
        error.detail = f"jobs[{number}]: {error.detail}"
        for item in error.errors:
            if item.loc[0] == "body":
                item.loc = ["body", "jobs", number, *item.loc[1:]]
        raise
