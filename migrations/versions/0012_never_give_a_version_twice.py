"""Remember the newest version that each setting had, that no other schedule gets it"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

NUMBERS = ("guidance_scale", "guidance_rescale", "guidance_start", "guidance_end", "eta")
KEY = ("model_id", "sampler", "num_steps", "guidance_type", *NUMBERS)


def upgrade() -> None:
    op.create_table(
        "schedule_versions",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("newest", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.String(length=255), nullable=False),
        sa.Column("sampler", sa.String(length=255), nullable=False),
        sa.Column("num_steps", sa.Integer(), nullable=False),
        sa.Column("guidance_type", sa.String(length=255), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in NUMBERS),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name=op.f("fk_schedule_versions_model_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedule_versions")),
        sa.UniqueConstraint(*KEY, name="uq_schedule_versions_setting"),
    )
    key = ", ".join(KEY)
    newest = f"SELECT {key}, max(version) FROM schedules GROUP BY {key}"
    op.execute(f"INSERT INTO schedule_versions ({key}, newest) {newest}")


def downgrade() -> None:
    op.drop_table("schedule_versions")
