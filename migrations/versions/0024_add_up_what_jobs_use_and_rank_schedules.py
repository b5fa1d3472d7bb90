"""Add up what jobs use, and rank schedules by their scores"""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


SETTING = ["model_id", "sampler", "num_steps", "guidance_type", "guidance_scale", "guidance_rescale"]
SETTING += ["guidance_start", "guidance_end", "eta", "clipping", "call_key"]


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("owner", sa.String(255), nullable=True),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("network_calls", sa.Double(), nullable=False),
        sa.Column("network_rows", sa.Double(), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_usage"),
    )
    op.create_index("ix_usage_owner", "usage", ["owner", "id"])
    # Processes of the release before make jobs while they are replaced.
    op.add_column("tuning_jobs", sa.Column("used_calls", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("tuning_jobs", sa.Column("used_rows", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("tuning_jobs", sa.Column("used_seconds", sa.Double(), nullable=False, server_default="0"))
    op.add_column("sample_jobs", sa.Column("is_made_again", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("ix_schedules_score_id", "schedules", ["score", "id", *SETTING, "status", "private_to"])
    of_model = ["model_id", "score", "id", *SETTING[1:], "status", "private_to"]
    op.create_index("ix_schedules_model_id_score_id", "schedules", of_model)


def downgrade() -> None:
    op.drop_index("ix_schedules_model_id_score_id", "schedules")
    op.drop_index("ix_schedules_score_id", "schedules")
    op.drop_column("sample_jobs", "is_made_again")
    for name in ("used_seconds", "used_rows", "used_calls"):
        op.drop_column("tuning_jobs", name)
    op.drop_index("ix_usage_owner", "usage")
    op.drop_table("usage")
