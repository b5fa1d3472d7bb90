"""Keep schedules apart by how x0 is clipped: one that was tuned with clipping is not for sampling without"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

GUIDANCE = ("guidance_type", "guidance_scale", "guidance_rescale", "guidance_start", "guidance_end", "eta")


def upgrade() -> None:
    for table in ("schedules", "schedule_versions"):
        # Processes of the release before write rows without the column while an upgrade replaces them.
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("clipping", sa.String(255), nullable=False, server_default="own"))
    _make_keys((*GUIDANCE, "clipping"))


def downgrade() -> None:
    op.execute("DELETE FROM schedule_versions WHERE clipping <> 'own'")
    _make_keys(GUIDANCE)
    for table in ("schedules", "schedule_versions"):
        with op.batch_alter_table(table) as batch:
            batch.drop_column("clipping")


def _make_keys(how: tuple[str, ...]) -> None:
    """Make the constraints and the indexes that hold a setting anew, of these columns."""
    setting = ("model_id", "sampler", "num_steps", *how)
    for name in ("ix_schedules_id", "ix_schedules_model_id_id", "ix_schedules_model_id_num_steps_id"):
        op.drop_index(name, "schedules")
    op.drop_index("ix_schedules_resolve", "schedules")
    with op.batch_alter_table("schedules") as batch:
        batch.drop_constraint("uq_schedules_version", type_="unique")
        batch.create_unique_constraint("uq_schedules_version", [*setting, "version"])
    with op.batch_alter_table("schedule_versions") as batch:
        batch.drop_constraint("uq_schedule_versions_setting", type_="unique")
        batch.create_unique_constraint("uq_schedule_versions_setting", [*setting])
    others = ("sampler", "num_steps", *how, "status")
    op.create_index("ix_schedules_id", "schedules", ["id", *setting, "status"])
    op.create_index("ix_schedules_model_id_id", "schedules", ["model_id", "id", *others])
    by_steps = ["model_id", "num_steps", "id", "sampler", *how, "status"]
    op.create_index("ix_schedules_model_id_num_steps_id", "schedules", by_steps)
    op.create_index("ix_schedules_resolve", "schedules", [*setting, "status", "score", "id"])
