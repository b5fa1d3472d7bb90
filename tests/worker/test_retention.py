"""Samples are kept as long as was promised, and files as long as anybody needs them."""

import os
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from ulid import ULID

from service.registry.database import Registry
from service.registry.tables import (
    AuditEntry,
    JobState,
    SampleJob,
    Schedule,
    ScheduleAlias,
    ScheduleStatus,
    TuningJob,
    TuningJobEvent,
)
from service.registry.types import utc_now
from service.shared.artifacts import ArtifactStore
from worker import retention
from worker.retention import GRACE, Sweeper

pytestmark = pytest.mark.both_engines

KEEP_DAYS = 2.0
NOW = utc_now()
OLD, YOUNG = NOW - timedelta(days=KEEP_DAYS) - 2 * GRACE, NOW - timedelta(days=KEEP_DAYS) + GRACE


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path / 'artifacts'}")


@pytest.fixture
def sweeper(registry: Registry, artifacts: ArtifactStore) -> Sweeper:
    return Sweeper(registry, artifacts, KEEP_DAYS)


class Samples:
    """Jobs and files of given times."""

    def __init__(self, registry: Registry, artifacts: ArtifactStore, model_id: str) -> None:
        self.registry, self.artifacts, self.model_id = registry, artifacts, model_id

    def file(self, made_at: object) -> str:
        key = f"samples/{ULID.from_datetime(made_at)}.npy"  # type: ignore[arg-type]
        self.artifacts.put_array(key, np.zeros((2, 1, 2, 2), np.float32))
        return key

    def job(self, time: object, state: JobState = JobState.SUCCEEDED, **fields: object) -> str:
        over = state not in (JobState.QUEUED, JobState.RUNNING)
        job = SampleJob(
            id=f"smp_{ULID.from_datetime(time)}",  # type: ignore[arg-type]
            model_id=self.model_id,
            request={},
            request_hash="",
            num_images=1,
            state=state,
            created_at=time,
            finished_at=time if over else None,
            **fields,
        )
        with self.registry.write() as session:
            session.add(job)
        return job.id

    def left(self) -> set[str]:
        with self.registry.read() as session:
            return {job.id for job in session.query(SampleJob)}

    def files(self) -> set[str]:
        return set(self.artifacts.files("samples"))


@pytest.fixture
def samples(registry: Registry, artifacts: ArtifactStore, model_id: str) -> Samples:
    return Samples(registry, artifacts, model_id)


def test_samples_go_when_their_time_is_over_and_their_files_with_them(sweeper: Sweeper, samples: Samples) -> None:
    old, young = samples.file(OLD), samples.file(YOUNG)
    samples.job(OLD, artifact=old)
    kept = samples.job(YOUNG, artifact=young)
    sweeper.sweep_if_due()
    assert (samples.left(), samples.files()) == ({kept}, {young})


def test_a_file_stays_while_a_younger_job_needs_it(sweeper: Sweeper, samples: Samples) -> None:
    file = samples.file(OLD)
    samples.job(OLD, artifact=file)
    kept = samples.job(YOUNG, artifact=file, artifact_row=1)
    sweeper.sweep_if_due()
    assert (samples.left(), samples.files()) == ({kept}, {file})


def test_what_is_not_over_stays_however_old(sweeper: Sweeper, samples: Samples) -> None:
    waiting = {samples.job(OLD, state) for state in (JobState.QUEUED, JobState.RUNNING)}
    samples.job(OLD, JobState.FAILED)
    sweeper.sweep_if_due()
    assert samples.left() == waiting


def test_a_job_that_waited_for_long_is_kept_from_its_end_on(
    sweeper: Sweeper, samples: Samples, registry: Registry
) -> None:
    late = samples.job(OLD)
    with registry.write() as session:
        session.get_one(SampleJob, late).finished_at = NOW
    sweeper.sweep_if_due()
    assert samples.left() == {late}


def test_parts_go_with_the_whole(sweeper: Sweeper, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS_PER_TRANSACTION", 2)  # several rounds
    for _ in range(3):
        whole = samples.job(OLD, num_parts=3)
        for _ in range(3):
            samples.job(OLD, parent_id=whole)
    sweeper.sweep_if_due()
    assert samples.left() == set()


def test_a_file_that_no_job_ever_knew_of_goes_once_it_is_old(sweeper: Sweeper, samples: Samples) -> None:
    samples.file(OLD)
    new = samples.file(NOW)
    sweeper.sweep_if_due()
    assert samples.files() == {new}


def test_nothing_goes_where_samples_are_kept_for_ever(
    registry: Registry, artifacts: ArtifactStore, samples: Samples
) -> None:
    file = samples.file(OLD)
    job = samples.job(OLD, artifact=file)
    Sweeper(registry, artifacts, 0).sweep_if_due()
    assert (samples.left(), samples.files()) == ({job}, {file})


def test_files_that_were_never_stored_whole_go_after_a_day(
    sweeper: Sweeper, artifacts: ArtifactStore, samples: Samples, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts" / "partial"
    folder.mkdir(parents=True)
    for name, age in (("old", timedelta(days=2)), ("new", timedelta(hours=2))):
        (folder / name).write_bytes(b"half of it")
        time = (NOW - age).timestamp()
        os.utime(folder / name, (time, time))
    sweeper.sweep_if_due()
    assert artifacts.files("partial") == ["partial/new"]


@pytest.fixture
def history(registry: Registry, model_id: str) -> None:
    """Events, schedules and entries of the audit log, of two ages each."""
    setting = {"model_id": model_id, "sampler": "ddim", "num_steps": 1, "guidance_type": "uncond"}
    setting |= {"guidance_scale": Decimal(1), "eta": Decimal(0), "timesteps": [1.0, 0.0], "t_ratios": [1.0]}
    with registry.write() as session:
        for name, time in (("old", OLD), ("young", YOUNG)):
            for state in (JobState.SUCCEEDED, JobState.RUNNING):
                job = TuningJob(id=f"job_{name}_{state}", model_id=model_id, request={}, state=state)
                session.add(job)
                session.flush()
                session.add_all(TuningJobEvent(job_id=job.id, type=name, data={}, created_at=time) for _ in range(3))
            for version, status in enumerate((*ScheduleStatus, ScheduleStatus.REJECTED)):
                number = f"{name == 'young':d}{version}"
                id = f"sch_{ULID.from_datetime(time)!s:.24}{number}"
                version_number = 10 * (name == "young") + version
                row = Schedule(id=id, version=version_number, status=status, provenance={}, created_at=time, **setting)
                session.add(row)
                session.flush()
                if version == len(ScheduleStatus):
                    session.add(ScheduleAlias(model_id=model_id, name=name, schedule_id=row.id))
            audit_id = f"aud_{ULID.from_datetime(time)}"
            session.add(AuditEntry(id=audit_id, actor=name, action="a", object="o", outcome="done", created_at=time))


def left(registry: Registry) -> tuple[list[str], list[str], list[str]]:
    """The jobs that have events, the schedules, and the audit log."""
    with registry.read() as session:
        events = sorted({event.job_id for event in session.query(TuningJobEvent)})
        schedules = [f"{row.version} {row.status}" for row in session.query(Schedule).order_by(Schedule.version)]
        return events, schedules, sorted(entry.actor for entry in session.query(AuditEntry))


def test_events_rejected_schedules_and_the_audit_log_are_kept_as_long_as_each_setting_says(
    registry: Registry, artifacts: ArtifactStore, history: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "ROWS_PER_TRANSACTION", 2)  # Several rounds.
    everything = left(registry)
    Sweeper(registry, artifacts, KEEP_DAYS).sweep_if_due()
    assert left(registry) == everything
    events, schedules, audit = everything
    events.remove("job_old_succeeded")  # Not those of a job that is still run.
    Sweeper(registry, artifacts, 0, keep_events_days=KEEP_DAYS).sweep_if_due()
    assert left(registry) == (events, schedules, audit)
    schedules.remove("1 rejected")  # Not the one that an alias names.
    Sweeper(registry, artifacts, 0, keep_rejected_days=KEEP_DAYS).sweep_if_due()
    assert left(registry) == (events, schedules, audit)
    Sweeper(registry, artifacts, 0, keep_audit_days=KEEP_DAYS).sweep_if_due()
    assert left(registry) == (events, schedules, ["young"])
