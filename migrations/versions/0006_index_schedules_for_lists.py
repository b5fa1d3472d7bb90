"""Index schedules for lists by any filters"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

GUIDANCE = ["guidance_type", "guidance_scale", "guidance_rescale", "guidance_start", "guidance_end", "eta"]
LISTS = {
    "ix_schedules_model_id_num_steps_id": ["model_id", "num_steps", "id", "sampler", *GUIDANCE, "status"],
    "ix_schedules_model_id_id": ["model_id", "id", "sampler", "num_steps", *GUIDANCE, "status"],
    "ix_schedules_id": ["id", "model_id", "sampler", "num_steps", *GUIDANCE, "status"],
}


def upgrade() -> None:
    for name, columns in LISTS.items():
        op.create_index(name, "schedules", columns)


def downgrade() -> None:
    for name in LISTS:
        op.drop_index(name, table_name="schedules")
