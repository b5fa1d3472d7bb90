"""Let keys take turns: jobs are chosen by whose was begun the longest ago"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        op.f("ix_sample_jobs_owner_priority_started_at"), "sample_jobs", ["owner", "priority", "started_at"]
    )
    op.create_index(op.f("ix_tuning_jobs_owner_started_at"), "tuning_jobs", ["owner", "started_at"])


def downgrade() -> None:
    op.drop_index(op.f("ix_tuning_jobs_owner_started_at"), table_name="tuning_jobs")
    op.drop_index(op.f("ix_sample_jobs_owner_priority_started_at"), table_name="sample_jobs")
