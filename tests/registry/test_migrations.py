"""The migrations lead to exactly the tables of the code, and back, and keep what is stored."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from service.registry.database import Registry, SchemaError, alembic_config
from service.registry.jobs import claim, finish, renew
from service.registry.schedules import next_version
from service.registry.tables import Base, JobState, Model, Schedule, TuningJob

pytestmark = pytest.mark.both_engines

MODEL = """INSERT INTO models (id, name, content_hash, source, spec, created_at)
    VALUES ('mdl_1', 'm', 'hash', '{}', '{}', '2026-01-01')"""
# Processes of the release before go on writing while they are replaced. Their code is gone, so their statements are
# kept here as text: every column that they write, and none that came later.
RELEASE_BEFORE = "0012"
JOB = """INSERT INTO tuning_jobs (id, owner, model_id, idempotency_key, request_hash, network_calls, tuning_seconds,
    timesteps, state, request, progress, error, request_id, attempt, losses, fencing_token, lease_owner,
    lease_expires_at, cancel_requested, published_at, created_at, started_at, finished_at)
    VALUES ('{id}', NULL, 'mdl_1', NULL, NULL, 0, 0, NULL, 'queued', '{{}}', 0, NULL, NULL, 0, 0, 0, NULL, NULL, false,
    NULL, '2026-01-01', NULL, NULL)"""
SCHEDULE = """INSERT INTO schedules (id, job_id, model_id, sampler, num_steps, guidance_type, guidance_scale,
    guidance_rescale, guidance_start, guidance_end, eta, version, status, score, timesteps, t_ratios, provenance,
    created_at) VALUES ('{id}', NULL, 'mdl_1', 'ddim', 1, 'uncond', 1000000, 0, 0, 1000000000, 0, {version}, 'imported',
    NULL, '[1, 0]', '[1]', '{{}}', '2026-01-01')"""
SCHEDULE_VERSION = """INSERT INTO schedule_versions (model_id, sampler, num_steps, guidance_type, guidance_scale,
    guidance_rescale, guidance_start, guidance_end, eta, newest)
    VALUES ('mdl_1', 'ddim', 1, 'uncond', 1000000, 0, 0, 1000000000, 0, 1)"""
NEXT_SCHEDULE_VERSION = "UPDATE schedule_versions SET newest = newest + 1"
IDEMPOTENCY_KEY = """INSERT INTO idempotency_keys (key, request_hash, object_id, created_at)
    VALUES ('{key}', 'hash', '{object_id}', '2026-01-01')"""


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Registry]:
    registry = Registry(empty_database_url)
    yield registry
    registry.close()


UPGRADE = """
import sys
from service.registry.database import Registry
registry = Registry(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()  # All begin together.
registry.upgrade()
"""


def test_several_processes_may_upgrade_an_empty_database_at_once(empty_database_url: str) -> None:
    command = [sys.executable, "-c", UPGRADE, empty_database_url]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    assert ends == [("", 0)] * 4


def execute(registry: Registry, *statements: str) -> None:
    with registry.write() as session:
        for statement in statements:
            session.execute(text(statement))


def test_the_migrations_make_exactly_the_tables_of_the_code(empty: Registry) -> None:
    empty.upgrade()
    with empty.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_everything_can_be_undone(empty: Registry) -> None:
    empty.upgrade()
    command.downgrade(alembic_config(empty.url.render_as_string(hide_password=False)), "base")
    assert inspect(empty.engine).get_table_names() == ["alembic_version"]


@pytest.mark.parametrize(
    ("schema", "mend"), [("0001", "commit e4c2e61"), ("0011", "commit e4c2e61"), ("9999", "newer")]
)
def test_a_schema_that_no_migration_leads_on_from_is_refused_and_left_as_it_is(
    empty: Registry, schema: str, mend: str
) -> None:
    execute(
        empty,
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)",
        f"INSERT INTO alembic_version VALUES ('{schema}')",
        "CREATE TABLE models (id VARCHAR(255))",
    )
    with pytest.raises(SchemaError, match=f"has schema {schema}; accepted: .* 0012.*{mend}"):
        empty.upgrade()
    assert sorted(inspect(empty.engine).get_table_names()) == ["alembic_version", "models"]
    with empty.read() as session:
        assert session.scalars(text("SELECT version_num FROM alembic_version")).all() == [schema]


def test_the_release_before_works_on_the_new_schema_until_it_is_replaced(empty: Registry) -> None:
    """A migration is written so that this passes with RELEASE_BEFORE at the schema, and the statements, before it."""
    config = alembic_config(empty.url.render_as_string(hide_password=False))
    command.upgrade(config, RELEASE_BEFORE)
    execute(empty, MODEL, JOB.format(id="job_1"), IDEMPOTENCY_KEY.format(key="k1", object_id="job_1"))
    execute(empty, SCHEDULE.format(id="sch_1", version=1), SCHEDULE_VERSION)
    empty.upgrade()
    # Older processes go on to know their keys, to store jobs, and to give schedules their versions.
    execute(empty, JOB.format(id="job_2"), IDEMPOTENCY_KEY.format(key="k2", object_id="job_2"))
    with pytest.raises(IntegrityError):
        execute(empty, IDEMPOTENCY_KEY.format(key="k1", object_id="job_3"))
    execute(empty, NEXT_SCHEDULE_VERSION, SCHEDULE.format(id="sch_2", version=2))
    # Newer processes work beside them, and on what they stored before and after the upgrade.
    with empty.write() as session:
        session.add(TuningJob(id="job_4", model_id="mdl_1", request={}))
        for job_id in ("job_1", "job_2"):
            claimed = claim(session, TuningJob, job_id, "newer", 60)
            assert claimed is not None
            finish(session, renew(session, claimed, 60), JobState.SUCCEEDED)
        key = {name: getattr(session.get_one(Schedule, "sch_2"), name) for name in Schedule.KEY}
        assert next_version(session, key) == 3
    # Older processes can read what newer ones wrote.
    with empty.read() as session:
        jobs = session.execute(text("SELECT id, state FROM tuning_jobs ORDER BY id")).all()
        assert jobs == [("job_1", "succeeded"), ("job_2", "succeeded"), ("job_4", "queued")]
        assert session.scalars(text("SELECT newest FROM schedule_versions")).all() == [3]
    # The upgrade can be undone, and the release before works again.
    command.downgrade(config, RELEASE_BEFORE)
    execute(empty, JOB.format(id="job_5"))


def test_nothing_that_is_private_is_handed_to_a_release_that_would_show_it(empty: Registry) -> None:
    empty.upgrade()
    execute(empty, MODEL)
    with empty.write() as session:
        session.get_one(Model, "mdl_1").private_to = "key_1"
    config = alembic_config(empty.url.render_as_string(hide_password=False))
    with pytest.raises(RuntimeError, match="models has private rows; accepted: none"):
        command.downgrade(config, "0016")
    with empty.read() as session:
        assert session.get_one(Model, "mdl_1").private


def test_upgrading_twice_changes_nothing(empty: Registry) -> None:
    empty.upgrade()
    execute(empty, MODEL, SCHEDULE.format(id="sch_1", version=1))
    empty.upgrade()
    with empty.read() as session:
        assert session.get_one(Schedule, "sch_1").version == 1
        assert session.scalars(text("SELECT number FROM registry_changes")).all() == [0]
