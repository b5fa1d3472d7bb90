"""Tell lost workers from attempts, find who refers to a file, and count what grows in 64 bits"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

JOBS = ("tuning_jobs", "tuning_tasks", "sample_jobs")
COUNTS = (("tuning_jobs", "network_calls"), ("evaluations", "network_calls"))


def upgrade() -> None:
    for table in JOBS:
        # The database's default lets processes of the version before insert rows while they are replaced.
        op.add_column(table, sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))
    op.create_index("ix_sample_jobs_artifact", "sample_jobs", ["artifact"])
    _alter_counts(sa.Integer(), sa.BigInteger())


def downgrade() -> None:
    _alter_counts(sa.BigInteger(), sa.Integer())
    op.drop_index("ix_sample_jobs_artifact", table_name="sample_jobs")
    for table in JOBS:
        with op.batch_alter_table(table) as batch:
            batch.drop_column("losses")


def _alter_counts(before: sa.types.TypeEngine[int], after: sa.types.TypeEngine[int]) -> None:
    for table, column in COUNTS:
        with op.batch_alter_table(table) as batch:
            batch.alter_column(column, existing_type=before, type_=after, existing_nullable=False)
    if op.get_bind().dialect.name == "postgresql":  # SQLite's row ids have 64 bits
        op.alter_column("tuning_job_events", "id", existing_type=before, type_=after, existing_nullable=False)
        op.execute(f"ALTER SEQUENCE tuning_job_events_id_seq AS {after.compile(op.get_bind().dialect)}")
