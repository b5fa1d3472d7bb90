"""Store schedules that were not evaluated"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("schedules") as table:
        table.alter_column("score", existing_type=sa.Double(), nullable=True)


def downgrade() -> None:
    # What has no score cannot be stored before this migration, nor what names it.
    unscored = "IN (SELECT id FROM schedules WHERE score IS NULL)"
    op.execute(f"DELETE FROM schedule_aliases WHERE schedule_id {unscored}")
    op.execute(f"DELETE FROM sample_jobs WHERE schedule_id {unscored}")
    op.execute("DELETE FROM schedules WHERE score IS NULL")
    with op.batch_alter_table("schedules") as table:
        table.alter_column("score", existing_type=sa.Double(), nullable=False)
