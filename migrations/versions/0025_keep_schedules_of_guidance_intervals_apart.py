"""Keep schedules for intervals of guidance scales apart from those for one scale, and how each scale was judged

Besides, untuned samplers' distances to their teachers are kept, so that one job of a setting measures them for all.
"""

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
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
    "call_key",
)
HIGH = "guidance_scale_high"
IS_INTERVAL = sa.text("guidance_scale_high > 0")


def upgrade() -> None:
    for table in ("schedules", "schedule_versions"):
        # Processes of the release before write rows without the column while an upgrade replaces them.
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column(HIGH, sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "untuned_curves",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("curve", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_untuned_curves_model_id"),
        sa.PrimaryKeyConstraint("key", name="pk_untuned_curves"),
    )
    op.create_index("ix_untuned_curves_model_id", "untuned_curves", ["model_id"])
    op.add_column("evaluations", sa.Column("best_untuned", sa.JSON(), nullable=True))
    op.add_column("evaluations", sa.Column("guidance_scale", sa.Double(), nullable=True))
    op.add_column("evaluations", sa.Column("at_scales", sa.JSON(), nullable=True))
    _make_keys((*SETTING, HIGH))
    op.create_index(
        "ix_schedules_intervals",
        "schedules",
        ["model_id", "num_steps", "guidance_type", "status", "sampler", "guidance_scale"],
        sqlite_where=IS_INTERVAL,
        postgresql_where=IS_INTERVAL,
    )


def downgrade() -> None:
    """Schedules for intervals go, as the release before would take them for schedules of their lowest scale."""
    op.drop_index("ix_schedules_intervals", "schedules")
    of_intervals = sa.text("(SELECT id FROM schedules WHERE guidance_scale_high > 0)")
    for table in ("evaluations", "schedule_aliases"):
        named = sa.table(table, sa.column("schedule_id"))
        op.execute(sa.delete(named).where(named.c.schedule_id.in_(of_intervals)))
    samples = sa.table("sample_jobs", sa.column("schedule_id"))
    op.execute(sa.update(samples).where(samples.c.schedule_id.in_(of_intervals)).values(schedule_id=None))
    op.execute("DELETE FROM schedules WHERE guidance_scale_high > 0")
    op.execute("DELETE FROM schedule_versions WHERE guidance_scale_high > 0")
    _make_keys(SETTING)
    op.drop_column("evaluations", "at_scales")
    op.drop_column("evaluations", "guidance_scale")
    op.drop_column("evaluations", "best_untuned")
    op.drop_table("untuned_curves")
    for table in ("schedules", "schedule_versions"):
        with op.batch_alter_table(table) as batch:
            batch.drop_column(HIGH)


def _make_keys(setting: tuple[str, ...]) -> None:
    """Make the constraints and the indexes that hold a setting anew, of these columns."""
    listed_by = {"ix_schedules_id": ("id",), "ix_schedules_model_id_id": ("model_id", "id")}
    listed_by["ix_schedules_model_id_num_steps_id"] = ("model_id", "num_steps", "id")
    listed_by["ix_schedules_score_id"] = ("score", "id")
    listed_by["ix_schedules_model_id_score_id"] = ("model_id", "score", "id")
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
        op.create_index(name, "schedules", [*first, *(column for column in filters if column not in first)])
    op.create_index("ix_schedules_resolve", "schedules", [*setting, "private_to", "status", "score", "id"])
