"""Delete models that finished jobs name: their rows remain as history, and their content may be registered again"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

THERE = sa.text("deleted_at IS NULL")


def upgrade() -> None:
    with op.batch_alter_table("models") as batch:
        batch.add_column(sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
        batch.drop_constraint("uq_models_content_hash", type_="unique")
    name = op.f("ix_models_content_hash")
    op.create_index(name, "models", ["content_hash"], unique=True, sqlite_where=THERE, postgresql_where=THERE)


def downgrade() -> None:
    # The release before knows no deleted models: theirs would be the only content that no two models may have.
    op.execute("UPDATE models SET content_hash = id WHERE deleted_at IS NOT NULL")
    op.drop_index(op.f("ix_models_content_hash"), table_name="models")
    with op.batch_alter_table("models") as batch:
        batch.create_unique_constraint("uq_models_content_hash", ["content_hash"])
        batch.drop_column("deleted_at")
