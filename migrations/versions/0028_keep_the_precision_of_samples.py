"""Keep the precision of samples"""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sample_jobs", sa.Column("dtype", sa.String(length=16), nullable=True))


def downgrade() -> None:
    op.drop_column("sample_jobs", "dtype")
