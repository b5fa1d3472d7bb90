"""Keep schedules of pipelines apart by their call: one that was tuned at a size is not found for another

Besides, tuning jobs on pipelines keep their state, and sampling jobs which of their images were flagged.
"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

SETTING = (
    "model_id",
    "sampler",
    "num_steps",
    "guidance_type",
    "guidance_scale",
    "guidance_rescale",
    "guidance_start",
    "guidance_end",
    "eta",
    "clipping",
)
CALL_KEY = (*SETTING, "call_key")


def upgrade() -> None:
    for table in ("schedules", "schedule_versions"):
        # Processes of the release before write rows without the column while an upgrade replaces them.
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("call_key", sa.String(255), nullable=False, server_default=""))
    op.add_column("schedules", sa.Column("call", sa.JSON(), nullable=True))
    op.add_column("tuning_jobs", sa.Column("pipeline_state", sa.JSON(), nullable=True))
    op.add_column("sample_jobs", sa.Column("flagged", sa.JSON(), nullable=True))
    _make_keys(CALL_KEY)


def downgrade() -> None:
    """Schedules that belong to a call go, as without it they would be found for others."""
    of_calls = sa.text("(SELECT id FROM schedules WHERE call_key <> '')")
    for table in ("evaluations", "schedule_aliases"):
        named = sa.table(table, sa.column("schedule_id"))
        op.execute(sa.delete(named).where(named.c.schedule_id.in_(of_calls)))
    samples = sa.table("sample_jobs", sa.column("schedule_id"))
    op.execute(sa.update(samples).where(samples.c.schedule_id.in_(of_calls)).values(schedule_id=None))
    op.execute("DELETE FROM schedules WHERE call_key <> ''")
    op.execute("DELETE FROM schedule_versions WHERE call_key <> ''")
    _make_keys(SETTING)
    op.drop_column("sample_jobs", "flagged")
    op.drop_column("tuning_jobs", "pipeline_state")
    op.drop_column("schedules", "call")
    for table in ("schedules", "schedule_versions"):
        with op.batch_alter_table(table) as batch:
            batch.drop_column("call_key")


def _make_keys(setting: tuple[str, ...]) -> None:
    """Make the constraints and the indexes that hold a setting anew, of these columns."""
    listed_by = {"ix_schedules_id": (), "ix_schedules_model_id_id": ("model_id",)}
    listed_by["ix_schedules_model_id_num_steps_id"] = ("model_id", "num_steps")
    for name in (*listed_by, "ix_schedules_resolve"):
        op.drop_index(name, "schedules")
    with op.batch_alter_table("schedules") as batch:
        batch.drop_constraint("uq_schedules_version", type_="unique")
        batch.create_unique_constraint("uq_schedules_version", [*setting, "private_to", "version"])
    with op.batch_alter_table("schedule_versions") as batch:
        batch.drop_constraint("uq_schedule_versions_setting", type_="unique")
        batch.create_unique_constraint("uq_schedule_versions_setting", [*setting, "private_to"])
    filters = (*setting, "status", "private_to")
    for name, first in listed_by.items():
        op.create_index(name, "schedules", [*first, "id", *(column for column in filters if column not in first)])
    op.create_index("ix_schedules_resolve", "schedules", [*setting, "private_to", "status", "score", "id"])
