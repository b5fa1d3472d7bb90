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
    # Processes of the release before write `idempotency_key` and `request_hash` of tuning jobs until they are replaced:
    # they stay, for a later release to drop.
    with op.batch_alter_table("tuning_jobs") as batch:
        batch.alter_column("request_hash", existing_type=sa.String(length=255), nullable=True)


def downgrade() -> None:
    op.execute("UPDATE tuning_jobs SET request_hash = '' WHERE request_hash IS NULL")
    with op.batch_alter_table("tuning_jobs") as batch:
        batch.alter_column("request_hash", existing_type=sa.String(length=255), nullable=False)
    op.drop_table("idempotency_keys")
