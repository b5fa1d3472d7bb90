"""The tables. A change here needs a migration in `migrations/versions`; a test compares the two."""

from collections.abc import Iterable
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, MetaData, String, UniqueConstraint, false, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from service.registry.types import ExactDecimal, UtcDateTime, new_id, utc_now


class JobState(StrEnum):
    """The life of a tuning or sampling job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


_NOT_DELETED = text("deleted_at IS NULL")
IS_GUIDANCE_INTERVAL = text("guidance_scale_high > 0")
FINAL_STATES = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class ScheduleStatus(StrEnum):
    """Whether a schedule beat the untuned one on held-out noise. Imported schedules were not measured.

    Undecided ones are rejected, too: their evaluation has the verdict.
    """

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    IMPORTED = "imported"


class UsageKind(StrEnum):
    """The kinds of jobs whose use of networks and devices is added up."""

    TUNING = "tuning"
    SAMPLING = "sampling"


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        datetime: UtcDateTime,
        Decimal: ExactDecimal,
        dict[str, Any]: JSON,
        list[float]: JSON,
        list[str]: JSON,
        str: String(255),
    }


PUBLIC = ""


class CanBePrivate:
    """The columns of what one API key may have for itself.

    Attributes:
        owner: the key that made it; null if none was needed, and of what older versions stored.
        private_to: the one key that sees it, beside those that may administer; `PUBLIC`: every key sees it.
    """

    owner: Mapped[str | None]
    private_to: Mapped[str] = mapped_column(default=PUBLIC, server_default=PUBLIC)

    @property
    def private(self) -> bool:
        return self.private_to != PUBLIC


class Model(CanBePrivate, Base):
    """A frozen network. `spec` describes it to users; `source` says how a worker loads it.

    The row of a model that was deleted has a `deleted_at`. It remains, because jobs and schedules name it, and only
    their history shows it. Its files are gone.
    """

    __tablename__ = "models"
    __table_args__ = (
        Index(
            "ix_models_content_hash",
            "content_hash",
            "private_to",
            unique=True,
            sqlite_where=_NOT_DELETED,
            postgresql_where=_NOT_DELETED,
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("mdl"))
    name: Mapped[str]
    content_hash: Mapped[str]
    # {"builtin": name}, {"artifact": folder, "ignored_files": names}, {"path": folder below MODELS_DIR}, or
    # {"hub": name, "revision": commit}. A pipeline's has its "kind" and "dtype", too, and a "fingerprint" if its files
    # are not ours.
    source: Mapped[dict[str, Any]]
    spec: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    deleted_at: Mapped[datetime | None]

    @property
    def ignored_files(self) -> list[str]:
        """The files of its archive that nothing reads."""
        names: list[str] = self.source.get("ignored_files", [])
        return names

    @property
    def path(self) -> str | None:
        """Its folder below MODELS_DIR; None for one that is elsewhere."""
        return self.source.get("path")

    @property
    def hub(self) -> str | None:
        """Its name in the Hugging Face cache; None for one that is elsewhere."""
        return self.source.get("hub")

    @property
    def revision(self) -> str | None:
        """The commit of a model in the Hugging Face cache."""
        return self.source.get("revision")


class Job(Base):
    """The columns of every kind of job: its request, its state, and the lease of the worker that runs it.

    A worker owns a job while `fencing_token` is the one it got by claiming it, and renews `lease_expires_at`, a time of
    the database's clock. A worker that lost the lease can write nothing more. `published_at`, of the same clock, is
    null until the broker has a message of the job: the job's row is its own outbox.

    Attributes:
        progress: 0 to 1.
        request_id: the id of the HTTP request that made the job.
        losses: workers that were lost while running the job, since it last made progress.
    """

    __abstract__ = True

    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[JobState] = mapped_column(String(16), default=JobState.QUEUED)
    request: Mapped[dict[str, Any]]
    progress: Mapped[float] = mapped_column(default=0.0)
    error: Mapped[str | None] = mapped_column(String(2000))
    request_id: Mapped[str | None] = mapped_column(String(64))
    attempt: Mapped[int] = mapped_column(default=0)
    losses: Mapped[int] = mapped_column(default=0)
    fencing_token: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    published_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class TuningJob(Job):
    __tablename__ = "tuning_jobs"
    __table_args__ = (
        Index(None, "state", "published_at"),
        Index(None, "owner", "id"),
        Index(None, "owner", "state", "id"),
        Index(None, "owner", "started_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("job"))
    owner: Mapped[str | None]  # The API key that asked, or null if none was needed.
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    group_id: Mapped[str | None] = mapped_column(index=True)  # Jobs that were submitted together share it.
    # Processes of the release before `idempotency_keys` write these two columns while an upgrade replaces them.
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    request_hash: Mapped[str | None]
    network_calls: Mapped[int] = mapped_column(BigInteger, default=0)  # The sum over all attempts and workers.
    tuning_seconds: Mapped[float] = mapped_column(default=0.0)  # The sum over all attempts and workers.
    # The use by all attempts and workers, teachers and evaluation included: see `service.registry.usage.Use`.
    used_calls: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    used_rows: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    used_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    timesteps: Mapped[list[float] | None] = mapped_column(JSON)  # The grid so far: tuners may move it.
    solver_table: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # The learned solver so far.
    pipeline_state: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # See `PipelineState`.

    steps: Mapped[list["TuningJobStep"]] = relationship(order_by="TuningJobStep.step_index")
    schedule: Mapped["Schedule | None"] = relationship(back_populates="job")

    @property
    def schedule_id(self) -> str | None:
        """The schedule it made, if any."""
        return self.schedule.id if self.schedule else None


class TuningJobStep(Base):
    """The tuner's state for one sampler step: what resuming an interrupted job needs."""

    __tablename__ = "tuning_job_steps"

    job_id: Mapped[str] = mapped_column(ForeignKey("tuning_jobs.id"), primary_key=True)
    step_index: Mapped[int] = mapped_column(primary_key=True)
    t_ratio: Mapped[float]
    iterations: Mapped[int]
    memory: Mapped[list[float]]  # The optimiser's state.
    loss: Mapped[float | None]
    initial_loss: Mapped[float | None]
    done: Mapped[bool]


class TuningTask(Job):
    """One step of a tuning job whose steps are independent. Any worker may tune it.

    A job that is over has no task left to run.
    """

    __tablename__ = "tuning_tasks"
    __table_args__ = (UniqueConstraint("job_id", "step_index"), Index(None, "state", "published_at"))

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("tsk"))
    job_id: Mapped[str] = mapped_column(ForeignKey("tuning_jobs.id"))
    step_index: Mapped[int]


class TuningJobEvent(Base):
    __tablename__ = "tuning_job_events"
    __table_args__ = (Index(None, "job_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("tuning_jobs.id"))
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


def _list_indexes(
    table: str, listed_by: Iterable[tuple[str, ...]], order: tuple[str, ...], filters: tuple[str, ...]
) -> list[Index]:
    """Indexes that order rows for each of `listed_by`. They hold the other filters, too: a scan reads no rows."""

    def index(first: tuple[str, ...]) -> Index:
        name = "_".join(("ix", table, *first, *order))
        return Index(name, *first, *order, *(column for column in filters if column not in first))

    return [index(first) for first in listed_by]


class OfSetting:
    """The columns of the setting that a schedule is for."""

    KEY = (
        "model_id",
        "sampler",
        "num_steps",
        "guidance_type",
        "guidance_scale",
        "guidance_rescale",
        "guidance_start",
        "guidance_end",
        "eta",
        "clipping",
        "call_key",
        "guidance_scale_high",
    )

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    sampler: Mapped[str]
    num_steps: Mapped[int]
    guidance_type: Mapped[str]
    guidance_scale: Mapped[Decimal]
    guidance_rescale: Mapped[Decimal] = mapped_column(default=Decimal(0))
    guidance_start: Mapped[Decimal] = mapped_column(
        default=Decimal(0)
    )  # Guidance applies at times from here to `guidance_end`.
    guidance_end: Mapped[Decimal] = mapped_column(default=Decimal(1000))
    eta: Mapped[Decimal]
    clipping: Mapped[str] = mapped_column(default="own", server_default="own")  # "own": as the model's scheduler does.
    # The arguments of a pipeline's call that change latents, as `service.shared.pipeline_calls` digests them.
    call_key: Mapped[str] = mapped_column(default="", server_default="")
    # The end of an interval of guidance scales, which begins at `guidance_scale`. It is 0 of a single scale.
    guidance_scale_high: Mapped[Decimal] = mapped_column(default=Decimal(0), server_default="0")

    @property
    def guidance_scales(self) -> list[Decimal] | None:
        """The lowest and the highest guidance scale of an interval; None of a single scale."""
        return [self.guidance_scale, self.guidance_scale_high] if self.guidance_scale_high else None


class Schedule(OfSetting, CanBePrivate, Base):
    """A tuned few-step schedule, its place in the registry, and its evaluation.

    `score` is the metric that decides, tuned over untuned: below 1 is better. Imported schedules have neither score
    nor evaluation.
    """

    __tablename__ = "schedules"
    # Lists are indexed by these sets of filters, the narrowest first.
    LISTED_BY = (("model_id", "num_steps"), ("model_id",), ())
    RANKED_BY = (("model_id",), ())  # The same for lists that are sorted by score.
    __table_args__ = (
        UniqueConstraint(*OfSetting.KEY, "private_to", "version", name="uq_schedules_version"),
        Index("ix_schedules_resolve", *OfSetting.KEY, "private_to", "status", "score", "id"),
        Index(
            "ix_schedules_intervals",
            "model_id",
            "num_steps",
            "guidance_type",
            "status",
            "sampler",
            "guidance_scale",
            sqlite_where=IS_GUIDANCE_INTERVAL,
            postgresql_where=IS_GUIDANCE_INTERVAL,
        ),
        *_list_indexes("schedules", LISTED_BY, ("id",), (*OfSetting.KEY, "status", "private_to")),
        *_list_indexes("schedules", RANKED_BY, ("score", "id"), (*OfSetting.KEY, "status", "private_to")),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("sch"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("tuning_jobs.id"), unique=True)
    version: Mapped[int]
    status: Mapped[ScheduleStatus] = mapped_column(String(16))
    score: Mapped[float | None]
    timesteps: Mapped[list[float]]
    t_ratios: Mapped[list[float]]
    solver_table: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # Null: the sampler's own.
    call: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # The arguments behind `call_key`.
    provenance: Mapped[dict[str, Any]]  # {tuner: {objective, ...}, seed, timetuner}
    created_at: Mapped[datetime] = mapped_column(default=utc_now)

    job: Mapped["TuningJob | None"] = relationship(back_populates="schedule")
    evaluation: Mapped["EvaluationRow | None"] = relationship(back_populates="schedule", cascade="all, delete-orphan")

    @property
    def dtype(self) -> str:
        """The precision that a network runs in with it: another than float32 only if it was accepted in that one.

        What is imported tells of evidence of others, and older versions have compared within one precision.
        """
        accepted_in: str = self.provenance.get("serves_in", "float32")
        return accepted_in if self.status == ScheduleStatus.ACCEPTED else "float32"


class ScheduleVersion(OfSetting, Base):
    """The newest version that a setting ever had. Deleted schedules keep their versions, which are not given again.

    Each key counts its private schedules for itself: a gap between versions would tell of others' schedules.
    """

    __tablename__ = "schedule_versions"
    __table_args__ = (UniqueConstraint(*OfSetting.KEY, "private_to", name="uq_schedule_versions_setting"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    private_to: Mapped[str] = mapped_column(default=PUBLIC, server_default=PUBLIC)
    newest: Mapped[int]


class ScheduleAlias(Base):
    __tablename__ = "schedule_aliases"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id"), index=True)


class EvaluationRow(Base):
    """The evaluation of a schedule against untuned sampling, on the same held-out noise.

    Attributes:
        teacher_l2_change_low: lower end of the 95 % interval of the paired difference, after - before.
        verdict: accepted, rejected or undecided; null of evaluations by versions that knew two verdicts.
        reason: why it is that verdict.
        worth: how many untuned steps it is worth, as the core's `Worth.to_dict` writes it; null if not measured.
        best_untuned: the untuned choice that the schedule has to be nearer to the teacher than, as the API tells it.
        guidance_scale: the scale that the figures are of, where the schedule is for an interval of scales.
        at_scales: what was found at each scale that such a schedule was evaluated at, as the API tells it.
        wall_time_seconds: time of tuning, without the evaluation.
        network_calls: samples put through the network while tuning.
    """

    __tablename__ = "evaluations"

    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id"), primary_key=True)
    num_samples: Mapped[int]
    teacher_num_steps: Mapped[int]
    seed: Mapped[int]
    teacher_l2_before: Mapped[float]
    teacher_l2_after: Mapped[float]
    teacher_l2_change_low: Mapped[float]
    teacher_l2_change_high: Mapped[float]
    frechet_before: Mapped[float | None]
    frechet_after: Mapped[float | None]
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)  # {name: {before, after, change, low, high}}
    verdict: Mapped[str | None] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(2000))
    worth: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    best_untuned: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    guidance_scale: Mapped[float | None]
    at_scales: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True))
    wall_time_seconds: Mapped[float]
    network_calls: Mapped[int] = mapped_column(BigInteger)

    schedule: Mapped["Schedule"] = relationship(back_populates="evaluation")


class UntunedCurveRow(Base):
    """An untuned sampler's distances to its teacher, which all tuning jobs of one setting and seed have in common.

    Attributes:
        key: a digest of all that decides the distances.
        curve: as the core's `UntunedCurve.to_dict` writes it.
    """

    __tablename__ = "untuned_curves"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    curve: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class SampleJob(Job):
    """A request for samples, or a part of one.

    A request for more images than a worker samples at once is split into parts, which are jobs with a `parent_id`. Its
    own row has `num_parts`, and no worker takes it. `published_at` stays null, because sampling jobs have no messages:
    workers are told that there is work, not which.

    Attributes:
        owner: the API key that asked, or null if none was needed.
        request_hash: a hash of all that decides the images.
        dtype: the precision that the network runs in; null of pipelines, which have their own, and of jobs that older
            versions made.
        priority: jobs of the lowest number go first.
        deadline_at: a job that has not begun by then is dropped.
        first_image: the number of a part's first image in its parent.
        artifact: a .npy file, which may hold images of other jobs, too.
        artifact_row: the row of the job's first image in the file.
        traceparent: the W3C trace context of the request.
        flagged: the numbers of the images that a pipeline's safety checker held back; null if it has none.
        is_made_again: its images were damaged. Nobody is charged for making them again.
    """

    __tablename__ = "sample_jobs"
    __table_args__ = (
        Index(None, "state", "priority", "id"),
        Index(None, "owner", "priority", "started_at"),
        Index(None, "owner", "id"),
        Index(None, "state", "owner", "priority", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("smp"))
    owner: Mapped[str | None]  # The API key that asked, or null if none was needed.
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    schedule_id: Mapped[str | None] = mapped_column(ForeignKey("schedules.id"), index=True)
    request_hash: Mapped[str] = mapped_column(index=True)
    dtype: Mapped[str | None] = mapped_column(String(16))
    num_images: Mapped[int]
    priority: Mapped[int] = mapped_column(default=0)
    deadline_at: Mapped[datetime | None]
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("sample_jobs.id"), index=True)
    first_image: Mapped[int] = mapped_column(default=0)
    num_parts: Mapped[int] = mapped_column(default=0)
    traceparent: Mapped[str | None]
    artifact: Mapped[str | None] = mapped_column(index=True)
    artifact_row: Mapped[int] = mapped_column(default=0)
    flagged: Mapped[list[int] | None] = mapped_column(JSON(none_as_null=True))
    is_made_again: Mapped[bool] = mapped_column(default=False, server_default=false())


class ModelRegistration(CanBePrivate, Job):
    """A model that was handed in, until a worker has loaded and described it.

    The model gets this row's id, unless its content is that of a registered model. `request` is
    {"ignored_files": names}, and `published_at` stays null: a bell tells workers that there is something to do, not
    what. Where the files are not ours, a worker replaces `content_hash` and `source` by what it finds.
    """

    __tablename__ = "model_registrations"
    __table_args__ = (Index(None, "state"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("mdl"))
    name: Mapped[str]
    content_hash: Mapped[str] = mapped_column(index=True)
    artifact: Mapped[str | None]  # The folder of its files in the artifact store; null: they are not ours.
    source: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")  # The rest of `Model.source`.
    model_id: Mapped[str | None]  # the model it became, or that has the same content; not a foreign key: it may go
    refused_field: Mapped[str | None]  # what `error` is about, if the model cannot be used; null of other errors

    @property
    def ignored_files(self) -> list[str]:
        """The files of its archive that nothing reads."""
        names: list[str] = self.request.get("ignored_files", [])
        return names

    @property
    def whole_source(self) -> dict[str, Any]:
        """The `source` of the model that it becomes."""
        artifact = {} if self.artifact is None else {"artifact": self.artifact}
        return {**artifact, **self.source, **self.request}


class Webhook(Base):
    """An entry of the outbox of webhooks. It is made with its job and due when the job is over.

    `next_attempt_at` is null when the webhook was delivered or given up. `error` is that of the last attempt.
    """

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("whk"))
    tuning_job_id: Mapped[str | None] = mapped_column(ForeignKey("tuning_jobs.id", ondelete="CASCADE"), index=True)
    sample_job_id: Mapped[str | None] = mapped_column(ForeignKey("sample_jobs.id", ondelete="CASCADE"), index=True)
    url: Mapped[str] = mapped_column(String(2000))
    attempt: Mapped[int] = mapped_column(default=0)  # The number of attempts so far.
    next_attempt_at: Mapped[datetime | None] = mapped_column(default=utc_now, index=True)
    delivered_at: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(String(2000))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class RegistryChanges(Base):
    """How often models, schedules and aliases have changed. Processes that cache them compare the number."""

    __tablename__ = "registry_changes"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger, default=0)


class StoredBytes(Base):
    """One row: the bytes of all artifacts. Nothing counts them while there is no quota.

    Attributes:
        number: the bytes that are stored, as they were counted last, and those that were taken since.
        taken: the bytes that were ever taken. It only grows.
    """

    __tablename__ = "stored_bytes"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger, default=0)
    taken: Mapped[int] = mapped_column(BigInteger, default=0)


class IdempotencyKey(Base):
    """A request that was done and must not be done again: see `service.access.idempotency`."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)  # A hash of the caller, the operation and the key's text.
    request_hash: Mapped[str]
    object_id: Mapped[str]  # The id of the row that the request made.
    created_at: Mapped[datetime] = mapped_column(default=utc_now, index=True)


class ApiKey(Base):
    """An API key and its limits. Keys are never deleted, because jobs and the audit log name them.

    `quota_used` is the part of `pixel_steps_per_day` that was used on `quota_day`, a day in UTC. `prefix` is the part
    of the key's text that is no secret. `last_used_at` is exact to a minute.
    """

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("key"))
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)
    secret_hash: Mapped[str]
    scopes: Mapped[list[str]]
    requests_per_minute: Mapped[int | None]
    pixel_steps_per_day: Mapped[int | None] = mapped_column(BigInteger)
    quota_day: Mapped[date | None]
    quota_used: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class AuditEntry(Base):
    """An entry of the audit log: a caller changed something, or was refused to.

    Attributes:
        actor: an API key's id, or `cli`.
        action: the operation id in the OpenAPI document, or the command's action.
        object: the id of the changed object; the request's path if it was refused.
        outcome: `done`, or `refused: ` and the status.
    """

    __tablename__ = "audit_log"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("aud"))
    actor: Mapped[str]
    action: Mapped[str]
    object: Mapped[str]
    outcome: Mapped[str]
    request_id: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class UsageTotal(Base):
    """The use of a model by the jobs of an API key that ended on one day, in UTC: see `service.registry.usage`.

    The id begins with the day. There is no reference to the model, so that adding locks no row but this one.
    """

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_owner", "owner", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date]
    owner: Mapped[str | None]  # The API key that asked, or null if none was needed.
    model_id: Mapped[str]
    kind: Mapped[UsageKind] = mapped_column(String(16))
    network_calls: Mapped[float]
    network_rows: Mapped[float]
    device_seconds: Mapped[float]
