"""Register models whose files are not in the artifact store, but in a folder of the operator or in a hub's cache"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("model_registrations") as batch:
        batch.add_column(sa.Column("source", sa.JSON(), nullable=False, server_default="{}"))
        batch.alter_column("artifact", existing_type=sa.String(), nullable=True)


def downgrade() -> None:
    """Registrations without files in the artifact store go, as the release before has no other place for them."""
    op.execute("DELETE FROM model_registrations WHERE artifact IS NULL")
    with op.batch_alter_table("model_registrations") as batch:
        batch.alter_column("artifact", existing_type=sa.String(), nullable=False)
        batch.drop_column("source")
