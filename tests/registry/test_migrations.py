"""The migrations lead to exactly the tables of the code, and back, and keep what is stored."""

from collections.abc import Iterator
from decimal import Decimal

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from service.registry.database import Registry, alembic_config
from service.registry.jobs import claim, finish, renew
from service.registry.keys import create_key
from service.registry.schedules import next_version
from service.registry.tables import Base, JobState, SampleJob, Schedule, ScheduleAlias, TuningJob

pytestmark = pytest.mark.both_engines

MODEL = "INSERT INTO models VALUES ('mdl_1', 'm', 'hash', '{}', '{}', '2026-01-01')"
SCHEDULE = """INSERT INTO schedules (id, model_id, sampler, num_steps, guidance_type, guidance_scale, eta, version,
    status, score, timesteps, t_ratios, provenance, created_at)
    VALUES ('{id}', 'mdl_1', 'ddim', 1, 'uncond', 1000000, 0, {version}, '{status}', {score}, '[1, 0]', '[1]', '{{}}',
    '2026-01-01')"""
JOB = """INSERT INTO tuning_jobs (id, model_id, request_hash, network_calls, tuning_seconds, state, request, progress,
    attempt, fencing_token, cancel_requested, created_at)
    VALUES ('{id}', 'mdl_1', '', 0, 0, '{state}', '{{"tuner": {{"objective": "next_eps", "lr": 0.002}}}}', 0, 1, 1,
    false, '2026-01-01')"""
STEP = "INSERT INTO tuning_job_steps VALUES ('{job}', 0, 0.9, 7, 0.1, 0.2, 0.3, 0.4)"
SAMPLE = """INSERT INTO sample_jobs (id, model_id, request_hash, num_images, priority, first_image, num_parts,
    artifact_row, state, request, progress, attempt, fencing_token, cancel_requested, created_at)
    VALUES ('{id}', 'mdl_1', '', 1, 0, 0, 0, 0, 'succeeded', '{{}}', 1, 1, 1, false, '2026-01-01')"""
# As processes of the release before go on to do while they are replaced.
JOB_OF_0010 = """INSERT INTO tuning_jobs (id, owner, model_id, idempotency_key, request_hash, network_calls,
    tuning_seconds, state, request, progress, attempt, losses, fencing_token, cancel_requested, created_at)
    VALUES ('{id}', NULL, 'mdl_1', '{key}', 'hash', 0, 0, 'queued', '{{}}', 0, 0, 0, 0, false, '2026-01-01')"""
SCHEDULE_OF_0010 = """INSERT INTO schedules (id, job_id, model_id, sampler, num_steps, guidance_type, guidance_scale,
    guidance_rescale, guidance_start, guidance_end, eta, version, status, score, timesteps, t_ratios, provenance,
    created_at) VALUES ('{id}', NULL, 'mdl_1', 'ddim', 1, 'uncond', 1000000, 0, 0, 1000000000, 0, {version}, 'imported',
    NULL, '[1, 0]', '[1]', '{{}}', '2026-01-01')"""
EVALUATION = "INSERT INTO evaluations VALUES ('sch_1', 16, 100, 0, 2, 1, -1.5, -0.5, NULL, NULL, 3, 4)"
ALIAS = "INSERT INTO schedule_aliases VALUES ('mdl_1', '{name}', '{schedule}')"


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Registry]:
    registry = Registry(empty_database_url)
    yield registry
    registry.close()


def execute(registry: Registry, *statements: str) -> None:
    with registry.write() as session:
        for statement in statements:
            session.execute(text(statement))


def ids(registry: Registry) -> list[str]:
    with registry.read() as session:
        return list(session.scalars(text("SELECT id FROM schedules ORDER BY id")))


def test_the_migrations_make_exactly_the_tables_of_the_code(empty: Registry) -> None:
    empty.upgrade()
    with empty.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_what_the_first_release_stored_outlives_all_migrations_and_running_them_twice(empty: Registry) -> None:
    command.upgrade(alembic_config(empty.url.render_as_string(hide_password=False)), "0001")
    tuned = SCHEDULE.format(id="sch_1", version=1, status="accepted", score=0.5)
    execute(empty, MODEL, tuned, ALIAS.format(name="production", schedule="sch_1"))
    for _ in range(2):
        empty.upgrade()
        with empty.read() as session:
            schedule = session.get_one(Schedule, "sch_1")
            assert (schedule.guidance_scale, schedule.score) == (Decimal(1), 0.5)
            assert session.get_one(ScheduleAlias, ("mdl_1", "production")).schedule_id == "sch_1"


def test_jobs_that_an_upgrade_finds_half_done_start_over_with_the_tuner_they_asked_for(empty: Registry) -> None:
    command.upgrade(alembic_config(empty.url.render_as_string(hide_password=False)), "0003")
    states = {"job_1": "succeeded", "job_2": "running", "job_3": "queued"}
    execute(empty, MODEL)
    for job_id, state in states.items():
        execute(empty, JOB.format(id=job_id, state=state), STEP.format(job=job_id))
    empty.upgrade()
    with empty.read() as session:
        jobs = {job_id: session.get_one(TuningJob, job_id) for job_id in states}
        assert [(step.t_ratio, step.done) for step in jobs["job_1"].steps] == [(0.9, True)]
        for job_id in ("job_2", "job_3"):
            assert jobs[job_id].steps == []
            assert jobs[job_id].request["tuner"] == {
                "objective": "next_eps",
                "lr": 0.002,
                "optimizer": "adam",
                "spread": False,
            }


def test_evaluations_outlive_the_metrics_that_came_later_and_their_going(empty: Registry) -> None:
    config = alembic_config(empty.url.render_as_string(hide_password=False))
    command.upgrade(config, "0001")
    tuned = SCHEDULE.format(id="sch_1", version=1, status="accepted", score=0.5)
    execute(empty, MODEL, tuned, EVALUATION)
    empty.upgrade()
    with empty.read() as session:
        evaluation = session.get_one(Schedule, "sch_1").evaluation
        assert evaluation is not None
        assert (evaluation.teacher_l2_after, evaluation.metrics, evaluation.reason) == (1, {}, None)
    command.downgrade(config, "0001")
    with empty.read() as session:
        assert list(session.execute(text("SELECT teacher_l2_after, network_calls FROM evaluations"))) == [(1, 4)]


def test_everything_can_be_undone(empty: Registry) -> None:
    empty.upgrade()
    command.downgrade(alembic_config(empty.url.render_as_string(hide_password=False)), "base")
    assert inspect(empty.engine).get_table_names() == ["alembic_version"]


def test_schedules_and_what_names_them_outlive_the_change_of_their_table(empty: Registry) -> None:
    config = alembic_config(empty.url.render_as_string(hide_password=False))
    command.upgrade(config, "0001")
    tuned = SCHEDULE.format(id="sch_1", version=1, status="accepted", score=0.5)
    execute(empty, MODEL, tuned, ALIAS.format(name="production", schedule="sch_1"))
    command.upgrade(config, "0002")
    imported = SCHEDULE.format(id="sch_2", version=2, status="imported", score="NULL")
    execute(empty, imported, ALIAS.format(name="trial", schedule="sch_2"))
    command.downgrade(config, "0001")
    assert ids(empty) == ["sch_1"]
    with empty.read() as session:
        assert list(session.scalars(text("SELECT name FROM schedule_aliases"))) == ["production"]


def test_jobs_outlive_the_coming_and_going_of_their_owners(empty: Registry) -> None:
    config = alembic_config(empty.url.render_as_string(hide_password=False))
    command.upgrade(config, "0006")
    execute(empty, MODEL, JOB.format(id="job_1", state="succeeded"), SAMPLE.format(id="smp_1"))
    for _ in range(2):
        empty.upgrade()
        with empty.write() as session:
            for job in (session.get_one(TuningJob, "job_1"), session.get_one(SampleJob, "smp_1")):
                assert (job.owner, job.state) == (None, "succeeded")
                job.owner = "key_1"
            create_key(session, "somebody")
        command.downgrade(config, "0006")


def test_the_release_before_works_on_the_new_schema_until_it_is_replaced(empty: Registry) -> None:
    config = alembic_config(empty.url.render_as_string(hide_password=False))
    command.upgrade(config, "0010")
    execute(empty, MODEL, JOB_OF_0010.format(id="job_1", key="k1"), SCHEDULE_OF_0010.format(id="sch_1", version=1))
    empty.upgrade()
    # Older processes know their keys, take and end jobs, and store schedules ...
    execute(empty, JOB_OF_0010.format(id="job_2", key="k2"), SCHEDULE_OF_0010.format(id="sch_2", version=2))
    with pytest.raises(IntegrityError):
        execute(empty, JOB_OF_0010.format(id="job_3", key="k1"))
    with empty.read() as session:
        found = session.scalars(
            text("SELECT id FROM tuning_jobs WHERE idempotency_key = 'k2' AND request_hash = 'hash'")
        )
        assert found.all() == ["job_2"]
    # ... beside newer ones, which take theirs, and whose own they can read.
    with empty.write() as session:
        session.add(TuningJob(id="job_4", model_id="mdl_1", request={}))
        claimed = claim(session, TuningJob, "job_2", "newer", 60)
        assert claimed is not None
        finish(session, renew(session, claimed, 60), JobState.SUCCEEDED)
        key = {name: getattr(session.get_one(Schedule, "sch_2"), name) for name in Schedule.KEY}
        assert next_version(session, key) == 3
    with empty.read() as session:
        of_all = "SELECT id, state, idempotency_key, request_hash FROM tuning_jobs ORDER BY id"
        assert [row[:2] for row in session.execute(text(of_all))] == [
            ("job_1", "queued"),
            ("job_2", "succeeded"),
            ("job_4", "queued"),
        ]
    command.downgrade(config, "0010")
    execute(empty, JOB_OF_0010.format(id="job_5", key="k5"))


def test_a_version_that_was_given_before_the_upgrade_is_not_given_again(empty: Registry) -> None:
    command.upgrade(alembic_config(empty.url.render_as_string(hide_password=False)), "0010")
    execute(empty, MODEL, *(SCHEDULE_OF_0010.format(id=f"sch_{k}", version=k) for k in (1, 2)))
    empty.upgrade()
    with empty.write() as session:
        newest = session.get_one(Schedule, "sch_2")
        key = {name: getattr(newest, name) for name in Schedule.KEY}
        session.delete(newest)
        session.flush()
        assert next_version(session, key) == 3
