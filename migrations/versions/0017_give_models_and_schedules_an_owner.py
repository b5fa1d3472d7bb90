"""Give models and schedules an owner, to whom they may be private"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
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
THERE = sa.text("deleted_at IS NULL")
CONTENT, RESOLVE = "ix_models_content_hash", "ix_schedules_resolve"


def upgrade() -> None:
    for table in ("models", "model_registrations", "schedules", "schedule_versions"):
        # Processes of the release before write rows without the columns while an upgrade replaces them.
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("private_to", sa.String(255), nullable=False, server_default=""))
            if table in ("models", "schedules"):
                batch.add_column(sa.Column("owner", sa.String(255), nullable=True))
    _make_keys(("private_to",))


def downgrade() -> None:
    # The release before shows all rows to everybody, and has one count of versions.
    for table in ("models", "model_registrations", "schedules"):
        private = sa.table(table, sa.column("private_to", sa.String()))
        count = sa.select(sa.func.count()).select_from(private).where(private.c.private_to != "")
        if op.get_bind().execute(count).scalar():
            raise RuntimeError(
                f"{table} has private rows; accepted: none, as the release before shows them to everybody"
            )
    op.execute("DELETE FROM schedule_versions WHERE private_to <> ''")
    _make_keys(())
    for table in ("models", "model_registrations", "schedules", "schedule_versions"):
        with op.batch_alter_table(table) as batch:
            batch.drop_column("private_to")
            if table in ("models", "schedules"):
                batch.drop_column("owner")


def _make_keys(whose: tuple[str, ...]) -> None:
    """Make the constraints and the indexes that hold a setting or a content anew, with these columns."""
    op.drop_index(CONTENT, "models")
    hashes = ["content_hash", *whose]
    op.create_index(CONTENT, "models", hashes, unique=True, sqlite_where=THERE, postgresql_where=THERE)
    for name in ("ix_schedules_id", "ix_schedules_model_id_id", "ix_schedules_model_id_num_steps_id", RESOLVE):
        op.drop_index(name, "schedules")
    with op.batch_alter_table("schedules") as batch:
        batch.drop_constraint("uq_schedules_version", type_="unique")
        batch.create_unique_constraint("uq_schedules_version", [*SETTING, *whose, "version"])
    with op.batch_alter_table("schedule_versions") as batch:
        batch.drop_constraint("uq_schedule_versions_setting", type_="unique")
        batch.create_unique_constraint("uq_schedule_versions_setting", [*SETTING, *whose])
    others = ("status", *whose)
    by_steps = ("model_id", "num_steps")
    for first in ((), ("model_id",), by_steps):
        name = "_".join(("ix_schedules", *first, "id"))
        op.create_index(name, "schedules", [*first, "id", *(each for each in SETTING if each not in first), *others])
    op.create_index(RESOLVE, "schedules", [*SETTING, *whose, "status", "score", "id"])
