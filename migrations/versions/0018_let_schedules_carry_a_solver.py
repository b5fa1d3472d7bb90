"""Let schedules carry a learned solver, and evaluations be undecided"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("schedules", sa.Column("solver_table", sa.JSON(), nullable=True))
    op.add_column("evaluations", sa.Column("verdict", sa.String(16), nullable=True))
    op.add_column("tuning_jobs", sa.Column("solver_table", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Schedules that have a solver go, as without it they would sample other images."""
    op.execute("DELETE FROM evaluations WHERE schedule_id IN (SELECT id FROM schedules WHERE solver_table IS NOT NULL)")
    op.execute("DELETE FROM schedules WHERE solver_table IS NOT NULL")
    op.drop_column("evaluations", "verdict")
    op.drop_column("tuning_jobs", "solver_table")
    op.drop_column("schedules", "solver_table")
