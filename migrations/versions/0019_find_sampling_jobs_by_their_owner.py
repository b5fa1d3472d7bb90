"""Find a page of sampling jobs by their owner"""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_sample_jobs_owner_id", "sample_jobs", ["owner", "id"])
    op.create_index("ix_sample_jobs_state_owner", "sample_jobs", ["state", "owner"])


def downgrade() -> None:
    op.drop_index("ix_sample_jobs_state_owner", "sample_jobs")
    op.drop_index("ix_sample_jobs_owner_id", "sample_jobs")
