"""Tell schedules apart by guidance interval and rescale"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

OLD_KEY = ["model_id", "sampler", "num_steps", "guidance_type", "guidance_scale", "eta"]
COLUMNS = {"guidance_rescale": 0, "guidance_start": 0, "guidance_end": 1_000_000_000}  # in millionths
NEW_KEY = [*OLD_KEY[:-1], *COLUMNS, "eta"]


def upgrade() -> None:
    for name, default in COLUMNS.items():
        op.add_column("schedules", sa.Column(name, sa.BigInteger(), nullable=False, server_default=str(default)))
    _replace_keys(NEW_KEY)
    with op.batch_alter_table("schedules") as table:
        for name in COLUMNS:
            table.alter_column(name, existing_type=sa.BigInteger(), server_default=None)


def downgrade() -> None:
    # Schedules of other guidance cannot be stored before this migration, nor what names them.
    other = " OR ".join(f"{name} != {default}" for name, default in COLUMNS.items())
    named = f"IN (SELECT id FROM schedules WHERE {other})"
    for referrer in ("schedule_aliases", "sample_jobs", "evaluations"):
        op.execute(f"DELETE FROM {referrer} WHERE schedule_id {named}")
    op.execute(f"DELETE FROM schedules WHERE {other}")
    _replace_keys(OLD_KEY)
    with op.batch_alter_table("schedules") as table:
        for name in COLUMNS:
            table.drop_column(name)


def _replace_keys(key: list[str]) -> None:
    op.drop_index("ix_schedules_resolve", table_name="schedules")
    with op.batch_alter_table("schedules") as table:
        table.drop_constraint("uq_schedules_version", type_="unique")
        table.create_unique_constraint("uq_schedules_version", [*key, "version"])
    op.create_index("ix_schedules_resolve", "schedules", [*key, "status", "score", "id"])
