"""Do any request with an idempotency key once, not only submissions of tuning jobs"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("request_hash", sa.String(length=255), nullable=False),
        sa.Column("object_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    with op.batch_alter_table("tuning_jobs") as batch:
        batch.drop_constraint("uq_tuning_jobs_idempotency_key", type_="unique")
        batch.drop_column("idempotency_key")
        batch.drop_column("request_hash")


def downgrade() -> None:
    with op.batch_alter_table("tuning_jobs") as batch:
        batch.add_column(sa.Column("request_hash", sa.String(length=255), nullable=False, server_default=""))
        batch.add_column(sa.Column("idempotency_key", sa.String(length=255), nullable=True))
        batch.create_unique_constraint("uq_tuning_jobs_idempotency_key", ["idempotency_key"])
    op.drop_table("idempotency_keys")
