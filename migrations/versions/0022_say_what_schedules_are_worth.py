"""Say what schedules are worth"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("evaluations", sa.Column("worth", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("evaluations", "worth")
