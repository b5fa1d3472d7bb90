"""Bound what is stored"""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "stored_bytes",
        sa.Column("id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("taken", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_stored_bytes"),
    )
    # `service.registry.stored_bytes` counts in this one row.
    op.execute("INSERT INTO stored_bytes (id, number, taken) VALUES (1, 0, 0)")


def downgrade() -> None:
    op.drop_table("stored_bytes")
