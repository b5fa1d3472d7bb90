"""Sample many requests at once, in parts where they are large, and remember what was sampled"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COLUMNS: tuple[tuple[str, sa.types.TypeEngine[Any], str], ...] = (
    ("request_hash", sa.String(length=255), "''"),
    ("num_images", sa.Integer(), "1"),
    ("priority", sa.Integer(), "0"),
    ("first_image", sa.Integer(), "0"),
    ("num_parts", sa.Integer(), "0"),
    ("artifact_row", sa.Integer(), "0"),
)
NULLABLE: tuple[tuple[str, sa.types.TypeEngine[Any]], ...] = (
    ("deadline_at", sa.DateTime(timezone=True)),
    ("parent_id", sa.String(length=255)),
    ("traceparent", sa.String(length=255)),
)
INDEXES = ("parent_id", "request_hash")


def upgrade() -> None:
    op.create_table(
        "registry_changes",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_registry_changes")),
    )
    op.execute("INSERT INTO registry_changes (id, number) VALUES (1, 0)")
    op.drop_index(op.f("ix_sample_jobs_state_published_at"), table_name="sample_jobs")
    for name, kind, default in COLUMNS:
        op.add_column("sample_jobs", sa.Column(name, kind, nullable=False, server_default=sa.text(default)))
    for name, kind in NULLABLE:
        op.add_column("sample_jobs", sa.Column(name, kind, nullable=True))
    _count_images()
    with op.batch_alter_table("sample_jobs") as table:
        for name, kind, _ in COLUMNS:
            table.alter_column(name, existing_type=kind, server_default=None)
        table.create_foreign_key(op.f("fk_sample_jobs_parent_id"), "sample_jobs", ["parent_id"], ["id"])
    for name in INDEXES:
        op.create_index(op.f(f"ix_sample_jobs_{name}"), "sample_jobs", [name], unique=False)
    op.create_index(op.f("ix_sample_jobs_state_priority_id"), "sample_jobs", ["state", "priority", "id"], unique=False)


def downgrade() -> None:
    """Parts go, and with them what requests that were split had got so far: these start over, whole."""
    op.execute("DELETE FROM sample_jobs WHERE parent_id IS NOT NULL")
    _start_over()
    op.drop_index(op.f("ix_sample_jobs_state_priority_id"), table_name="sample_jobs")
    for name in INDEXES:
        op.drop_index(op.f(f"ix_sample_jobs_{name}"), table_name="sample_jobs")
    with op.batch_alter_table("sample_jobs") as table:
        table.drop_constraint(op.f("fk_sample_jobs_parent_id"), type_="foreignkey")
        for name in (*(name for name, *_ in COLUMNS), *(name for name, _ in NULLABLE)):
            table.drop_column(name)
    op.create_index(op.f("ix_sample_jobs_state_published_at"), "sample_jobs", ["state", "published_at"], unique=False)
    op.drop_table("registry_changes")


def _count_images() -> None:
    jobs = sa.table(
        "sample_jobs", sa.column("id", sa.String), sa.column("request", sa.JSON), sa.column("num_images", sa.Integer)
    )
    connection = op.get_bind()
    for job_id, request in connection.execute(sa.select(jobs.c.id, jobs.c.request)).all():
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(num_images=request["num_images"]))


def _start_over() -> None:
    """What the older version cannot read: images that share a file with others', or lie in several."""
    op.execute(
        "UPDATE sample_jobs SET state = 'queued', artifact = NULL, progress = 0, finished_at = NULL, "
        "published_at = NULL WHERE state = 'succeeded' OR (num_parts > 0 AND state = 'running')"
    )
