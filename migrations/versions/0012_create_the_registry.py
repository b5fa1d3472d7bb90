"""Create the registry

This is the schema that the twelve migrations up to commit e4c2e61 made, and it keeps the number of the last of them: a
database that they brought to 0012 is up to date as it is.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "models",
    "registry_changes",
    "tuning_jobs",
    "tuning_job_steps",
    "tuning_tasks",
    "tuning_job_events",
    "schedules",
    "schedule_versions",
    "schedule_aliases",
    "evaluations",
    "sample_jobs",
    "webhooks",
    "idempotency_keys",
    "api_keys",
    "audit_log",
)
GUIDANCE = ("guidance_type", "guidance_scale", "guidance_rescale", "guidance_start", "guidance_end", "eta")
SETTING = ("model_id", "sampler", "num_steps", *GUIDANCE)


def upgrade() -> None:
    _create_models()
    _create_tuning()
    _create_schedules()
    _create_samples()
    _create_requests()
    _create_access()


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)


def _create_models() -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("content_hash", sa.String(255), nullable=False),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("content_hash", name="uq_models_content_hash"),
    )
    op.create_table(
        "registry_changes",
        sa.Column("id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_registry_changes"),
    )
    # `Registry.write` counts in this one row.
    op.execute("INSERT INTO registry_changes (id, number) VALUES (1, 0)")


def _create_tuning() -> None:
    op.create_table(
        "tuning_jobs",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("idempotency_key", sa.String(255), nullable=True),
        sa.Column("request_hash", sa.String(255), nullable=True),
        sa.Column("network_calls", sa.BigInteger(), nullable=False),
        sa.Column("tuning_seconds", sa.Double(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("error", sa.String(2000), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fencing_token", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(255), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("timesteps", sa.JSON(), nullable=True),
        sa.Column("owner", sa.String(255), nullable=True),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.Column("losses", sa.Integer(), nullable=False, server_default="0"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_tuning_jobs_model_id"),
        sa.PrimaryKeyConstraint("id", name="pk_tuning_jobs"),
        sa.UniqueConstraint("idempotency_key", name="uq_tuning_jobs_idempotency_key"),
    )
    op.create_index("ix_tuning_jobs_model_id", "tuning_jobs", ["model_id"])
    op.create_index("ix_tuning_jobs_owner_id", "tuning_jobs", ["owner", "id"])
    op.create_index("ix_tuning_jobs_owner_state_id", "tuning_jobs", ["owner", "state", "id"])
    op.create_index("ix_tuning_jobs_state_published_at", "tuning_jobs", ["state", "published_at"])
    op.create_table(
        "tuning_job_steps",
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("step_index", sa.Integer(), nullable=False),
        sa.Column("t_ratio", sa.Double(), nullable=False),
        sa.Column("iterations", sa.Integer(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("initial_loss", sa.Double(), nullable=True),
        sa.Column("memory", sa.JSON(), nullable=False),
        sa.Column("done", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["tuning_jobs.id"], name="fk_tuning_job_steps_job_id"),
        sa.PrimaryKeyConstraint("job_id", "step_index", name="pk_tuning_job_steps"),
    )
    op.create_table(
        "tuning_tasks",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("step_index", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("error", sa.String(2000), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fencing_token", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(255), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.Column("losses", sa.Integer(), nullable=False, server_default="0"),
        sa.ForeignKeyConstraint(["job_id"], ["tuning_jobs.id"], name="fk_tuning_tasks_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_tuning_tasks"),
        sa.UniqueConstraint("job_id", "step_index", name="uq_tuning_tasks_job_id_step_index"),
    )
    op.create_index("ix_tuning_tasks_state_published_at", "tuning_tasks", ["state", "published_at"])
    op.create_table(
        "tuning_job_events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False, autoincrement=True),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("type", sa.String(255), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["tuning_jobs.id"], name="fk_tuning_job_events_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_tuning_job_events"),
    )
    op.create_index("ix_tuning_job_events_job_id_id", "tuning_job_events", ["job_id", "id"])


def _create_schedules() -> None:
    op.create_table(
        "schedules",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=True),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("sampler", sa.String(255), nullable=False),
        sa.Column("num_steps", sa.Integer(), nullable=False),
        sa.Column("guidance_type", sa.String(255), nullable=False),
        sa.Column("guidance_scale", sa.BigInteger(), nullable=False),
        sa.Column("eta", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("timesteps", sa.JSON(), nullable=False),
        sa.Column("t_ratios", sa.JSON(), nullable=False),
        sa.Column("provenance", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("guidance_rescale", sa.BigInteger(), nullable=False),
        sa.Column("guidance_start", sa.BigInteger(), nullable=False),
        sa.Column("guidance_end", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["tuning_jobs.id"], name="fk_schedules_job_id"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_schedules_model_id"),
        sa.PrimaryKeyConstraint("id", name="pk_schedules"),
        sa.UniqueConstraint(*SETTING, "version", name="uq_schedules_version"),
        sa.UniqueConstraint("job_id", name="uq_schedules_job_id"),
    )
    op.create_index("ix_schedules_id", "schedules", ["id", *SETTING, "status"])
    op.create_index(
        "ix_schedules_model_id_id", "schedules", ["model_id", "id", "sampler", "num_steps", *GUIDANCE, "status"]
    )
    op.create_index(
        "ix_schedules_model_id_num_steps_id",
        "schedules",
        ["model_id", "num_steps", "id", "sampler", *GUIDANCE, "status"],
    )
    op.create_index("ix_schedules_resolve", "schedules", [*SETTING, "status", "score", "id"])
    op.create_table(
        "schedule_versions",
        sa.Column("id", sa.Integer(), nullable=False, autoincrement=True),
        sa.Column("newest", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("sampler", sa.String(255), nullable=False),
        sa.Column("num_steps", sa.Integer(), nullable=False),
        sa.Column("guidance_type", sa.String(255), nullable=False),
        sa.Column("guidance_scale", sa.BigInteger(), nullable=False),
        sa.Column("guidance_rescale", sa.BigInteger(), nullable=False),
        sa.Column("guidance_start", sa.BigInteger(), nullable=False),
        sa.Column("guidance_end", sa.BigInteger(), nullable=False),
        sa.Column("eta", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_schedule_versions_model_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_schedule_versions"),
        sa.UniqueConstraint(*SETTING, name="uq_schedule_versions_setting"),
    )
    op.create_table(
        "schedule_aliases",
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("schedule_id", sa.String(255), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_schedule_aliases_model_id"),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name="fk_schedule_aliases_schedule_id"),
        sa.PrimaryKeyConstraint("model_id", "name", name="pk_schedule_aliases"),
    )
    op.create_index("ix_schedule_aliases_schedule_id", "schedule_aliases", ["schedule_id"])
    op.create_table(
        "evaluations",
        sa.Column("schedule_id", sa.String(255), nullable=False),
        sa.Column("num_samples", sa.Integer(), nullable=False),
        sa.Column("teacher_num_steps", sa.Integer(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("teacher_l2_before", sa.Double(), nullable=False),
        sa.Column("teacher_l2_after", sa.Double(), nullable=False),
        sa.Column("teacher_l2_change_low", sa.Double(), nullable=False),
        sa.Column("teacher_l2_change_high", sa.Double(), nullable=False),
        sa.Column("frechet_before", sa.Double(), nullable=True),
        sa.Column("frechet_after", sa.Double(), nullable=True),
        sa.Column("wall_time_seconds", sa.Double(), nullable=False),
        sa.Column("network_calls", sa.BigInteger(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("reason", sa.String(2000), nullable=True),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name="fk_evaluations_schedule_id"),
        sa.PrimaryKeyConstraint("schedule_id", name="pk_evaluations"),
    )


def _create_samples() -> None:
    op.create_table(
        "sample_jobs",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("schedule_id", sa.String(255), nullable=True),
        sa.Column("artifact", sa.String(255), nullable=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("error", sa.String(2000), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fencing_token", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(255), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("request_hash", sa.String(255), nullable=False),
        sa.Column("num_images", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("first_image", sa.Integer(), nullable=False),
        sa.Column("num_parts", sa.Integer(), nullable=False),
        sa.Column("artifact_row", sa.Integer(), nullable=False),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("parent_id", sa.String(255), nullable=True),
        sa.Column("traceparent", sa.String(255), nullable=True),
        sa.Column("owner", sa.String(255), nullable=True),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.Column("losses", sa.Integer(), nullable=False, server_default="0"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_sample_jobs_model_id"),
        sa.ForeignKeyConstraint(["parent_id"], ["sample_jobs.id"], name="fk_sample_jobs_parent_id"),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name="fk_sample_jobs_schedule_id"),
        sa.PrimaryKeyConstraint("id", name="pk_sample_jobs"),
    )
    op.create_index("ix_sample_jobs_artifact", "sample_jobs", ["artifact"])
    op.create_index("ix_sample_jobs_model_id", "sample_jobs", ["model_id"])
    op.create_index("ix_sample_jobs_parent_id", "sample_jobs", ["parent_id"])
    op.create_index("ix_sample_jobs_request_hash", "sample_jobs", ["request_hash"])
    op.create_index("ix_sample_jobs_schedule_id", "sample_jobs", ["schedule_id"])
    op.create_index("ix_sample_jobs_state_priority_id", "sample_jobs", ["state", "priority", "id"])


def _create_requests() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("tuning_job_id", sa.String(255), nullable=True),
        sa.Column("sample_job_id", sa.String(255), nullable=True),
        sa.Column("url", sa.String(2000), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.String(2000), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["sample_job_id"], ["sample_jobs.id"], name="fk_webhooks_sample_job_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["tuning_job_id"], ["tuning_jobs.id"], name="fk_webhooks_tuning_job_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_webhooks"),
    )
    op.create_index("ix_webhooks_next_attempt_at", "webhooks", ["next_attempt_at"])
    op.create_index("ix_webhooks_sample_job_id", "webhooks", ["sample_job_id"])
    op.create_index("ix_webhooks_tuning_job_id", "webhooks", ["tuning_job_id"])
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request_hash", sa.String(255), nullable=False),
        sa.Column("object_id", sa.String(255), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def _create_access() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("prefix", sa.String(255), nullable=False),
        sa.Column("secret_hash", sa.String(255), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.Column("pixel_steps_per_day", sa.BigInteger(), nullable=True),
        sa.Column("quota_day", sa.Date(), nullable=True),
        sa.Column("quota_used", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("prefix", name="uq_api_keys_prefix"),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("action", sa.String(255), nullable=False),
        sa.Column("object", sa.String(255), nullable=False),
        sa.Column("outcome", sa.String(255), nullable=False),
        sa.Column("request_id", sa.String(255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
    )
