"""Tie tuning jobs into groups"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tuning_jobs", sa.Column("group_id", sa.String(255), nullable=True))
    op.create_index("ix_tuning_jobs_group_id", "tuning_jobs", ["group_id"])


def downgrade() -> None:
    op.drop_index("ix_tuning_jobs_group_id", "tuning_jobs")
    op.drop_column("tuning_jobs", "group_id")
