"""Tell webhooks of the ends of jobs"""

import sqlalchemy as sa
from alembic import op

from service.registry.types import UtcDateTime

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("tuning_job_id", sa.String(255), nullable=True),
        sa.Column("sample_job_id", sa.String(255), nullable=True),
        sa.Column("url", sa.String(2000), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", UtcDateTime(), nullable=True),
        sa.Column("delivered_at", UtcDateTime(), nullable=True),
        sa.Column("error", sa.String(2000), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tuning_job_id"], ["tuning_jobs.id"], op.f("fk_webhooks_tuning_job_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["sample_job_id"], ["sample_jobs.id"], op.f("fk_webhooks_sample_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    for column in ("tuning_job_id", "sample_job_id", "next_attempt_at"):
        op.create_index(op.f(f"ix_webhooks_{column}"), "webhooks", [column])


def downgrade() -> None:
    op.drop_table("webhooks")
