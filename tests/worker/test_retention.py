"""Samples are kept as long as was promised, and files as long as anybody needs them."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from ulid import ULID

from service.registry.database import Registry
from service.registry.tables import JobState, SampleJob
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
