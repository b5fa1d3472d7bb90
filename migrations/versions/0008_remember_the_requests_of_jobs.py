"""Remember the requests that jobs came by"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TABLES = ("tuning_jobs", "tuning_tasks", "sample_jobs")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("request_id", sa.String(64)))


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "request_id")
