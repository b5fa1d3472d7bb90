"""Find the next sampling jobs of each key"""

from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_sample_jobs_state_owner_priority_id", "sample_jobs", ["state", "owner", "priority", "id"])
    op.drop_index("ix_sample_jobs_state_owner", "sample_jobs")  # The new one begins with it.


def downgrade() -> None:
    op.create_index("ix_sample_jobs_state_owner", "sample_jobs", ["state", "owner"])
    op.drop_index("ix_sample_jobs_state_owner_priority_id", "sample_jobs")
