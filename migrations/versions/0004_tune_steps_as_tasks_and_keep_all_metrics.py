"""Tune steps as tasks, keep the state of every tuner and all metrics"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

GOING_ON = "state IN ('queued', 'running')"


def upgrade() -> None:
    _create_tasks()
    _complete_requests()
    op.add_column("tuning_jobs", sa.Column("timesteps", sa.JSON(), nullable=True))
    op.add_column("evaluations", sa.Column("metrics", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("evaluations", sa.Column("reason", sa.String(length=2000), nullable=True))
    with op.batch_alter_table("evaluations") as table:
        table.alter_column("metrics", existing_type=sa.JSON(), server_default=None)
    _start_over()
    op.add_column("tuning_job_steps", sa.Column("memory", sa.JSON(), nullable=False, server_default="[]"))
    op.add_column("tuning_job_steps", sa.Column("done", sa.Boolean(), nullable=False, server_default=sa.true()))
    with op.batch_alter_table("tuning_job_steps") as table:
        table.alter_column("memory", existing_type=sa.JSON(), server_default=None)
        table.alter_column("done", existing_type=sa.Boolean(), server_default=None)
        table.drop_column("exp_avg")
        table.drop_column("exp_avg_sq")


def downgrade() -> None:
    _start_over()
    for name in ("exp_avg", "exp_avg_sq"):
        op.add_column("tuning_job_steps", sa.Column(name, sa.Double(), nullable=False, server_default="0"))
    with op.batch_alter_table("tuning_job_steps") as table:
        for name in ("exp_avg", "exp_avg_sq"):
            table.alter_column(name, existing_type=sa.Double(), server_default=None)
        table.drop_column("done")
        table.drop_column("memory")
    with op.batch_alter_table("evaluations") as table:
        table.drop_column("reason")
        table.drop_column("metrics")
    with op.batch_alter_table("tuning_jobs") as table:
        table.drop_column("timesteps")
    op.drop_index(op.f("ix_tuning_tasks_state_published_at"), table_name="tuning_tasks")
    op.drop_table("tuning_tasks")


def _start_over() -> None:
    """Jobs that are not over tune from the start: one version's tuners cannot go on from the other's state."""
    op.execute(f"DELETE FROM tuning_job_steps WHERE job_id IN (SELECT id FROM tuning_jobs WHERE {GOING_ON})")


def _complete_requests() -> None:
    """Jobs that are not over get what was asked for, in the words of the new tuners."""
    jobs = sa.table("tuning_jobs", sa.column("id", sa.String), sa.column("request", sa.JSON))
    connection = op.get_bind()
    for job_id, request in connection.execute(sa.select(jobs).where(sa.text(GOING_ON))).all():
        is_per_step = request["tuner"]["objective"] == "next_eps"
        added = {"optimizer": "adam", "spread": False} if is_per_step else {"parameters": "t_ratios"}
        complete = {**request, "tuner": {**request["tuner"], **added}}
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(request=complete))


def _create_tasks() -> None:
    op.create_table(
        "tuning_tasks",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("step_index", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("error", sa.String(length=2000), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fencing_token", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(length=255), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["tuning_jobs.id"], name=op.f("fk_tuning_tasks_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tuning_tasks")),
        sa.UniqueConstraint("job_id", "step_index", name=op.f("uq_tuning_tasks_job_id_step_index")),
    )
    op.create_index(op.f("ix_tuning_tasks_state_published_at"), "tuning_tasks", ["state", "published_at"], unique=False)
