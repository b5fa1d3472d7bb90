"""A dispatcher's round goes on past whatever is broken, and who watches the dispatcher is told."""

from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import text

from service.registry.database import Registry
from service.registry.tables import JobState, SampleJob
from service.registry.types import utc_now
from service.shared.artifacts import ArtifactStore
from service.shared.queue import celery_app
from service.shared.settings import Settings
from tests.worker.in_process import BROKER_URL, InProcess
from worker import dispatcher_health
from worker.dispatcher import Round, dispatch_once
from worker.retention import Sweeper


@pytest.fixture
def worker(registry: Registry, tmp_path: Path) -> Iterator[InProcess]:
    worker = InProcess(tmp_path, registry)
    yield worker
    worker.close()


def failures(part: str) -> float:
    return REGISTRY.get_sample_value("timetuner_dispatch_failures_total", {"part": part}) or 0.0


def a_round(worker: InProcess) -> bool:
    app = celery_app(BROKER_URL)
    return dispatch_once(worker.registry, worker.artifacts, app, worker.bus, 5, 30.0)  # type: ignore[arg-type]


def lost_job(worker: InProcess, model: str) -> str:
    """A job whose worker was lost."""
    job_id = worker.submit(model)
    with worker.registry.write() as session:
        job = session.get_one(SampleJob, job_id)
        job.state, job.lease_expires_at = JobState.RUNNING, utc_now() - timedelta(hours=1)
    return job_id


def test_a_row_that_cannot_be_read_keeps_no_other_job_from_being_taken_back(worker: InProcess) -> None:
    model = worker.model("mixture-ring")
    jobs = [lost_job(worker, model) for _ in range(3)]
    assert a_round(worker)
    assert [worker.job(job_id).state for job_id in jobs] == [JobState.QUEUED] * 3
    jobs = [lost_job(worker, model) for _ in range(3)]
    with worker.registry.write() as session:
        session.execute(text("UPDATE sample_jobs SET request = '{' WHERE id = :id"), {"id": jobs[1]})
    before = failures("take_back")
    assert not a_round(worker)
    assert failures("take_back") == before + 1
    assert [worker.job(job_id).state for job_id in (jobs[0], jobs[2])] == [JobState.QUEUED] * 2


def test_a_part_that_is_missing_or_cut_fails_its_request_and_the_round_goes_on(worker: InProcess) -> None:
    model = worker.model("mixture-ring")
    parents = []
    for _ in range(2):
        parent, part = worker.submit(model, num_images=2), worker.submit(model, num_images=2)
        with worker.registry.write() as session:
            session.get_one(SampleJob, parent).num_parts = 1
            session.get_one(SampleJob, part).parent_id = parent
        parents.append(parent)
    worker.runtime.bus.published.clear()  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as nobody_joins:
        nobody_joins.setattr("worker.results.join_all", lambda *_: [])
        worker.serve()
    files = [worker.artifacts.root + "/" + key for key in worker.artifacts.files("samples")]
    with worker.registry.read() as session:
        part_of_first = session.query(SampleJob).filter_by(parent_id=parents[0]).one()
    if len(files) == 1:  # Both parts are in one file: give the second one a file of its own.
        with worker.registry.write() as session:
            second = session.query(SampleJob).filter_by(parent_id=parents[1]).one()
            worker.artifacts.put_array("samples/own.npy", worker.images(second.id))
            second.artifact, second.artifact_row = "samples/own.npy", 0
    path = Path(worker.artifacts.root) / (part_of_first.artifact or "")
    path.write_bytes(path.read_bytes()[:-60])
    assert a_round(worker)
    assert [worker.job(parent).state for parent in parents] == [JobState.FAILED, JobState.SUCCEEDED]
    assert (worker.job(parents[0]).error or "").startswith("the images of a part were damaged")
    assert a_round(worker)


def test_foreign_files_among_the_samples_stay_and_keep_nothing_from_being_swept(
    worker: InProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "artifacts" / "samples"
    old = "samples/01D3XZ3ZHCP3KG9VT4FGAD8KDR.npy"  # The time is in 2019.
    worker.artifacts.put(old, [b"old"])
    for name in (".nfs000000000012", "notes.txt", "zz.npy"):
        (folder / name).write_text("not ours")
    sweeper = Sweeper(worker.registry, worker.artifacts, 1)
    for _ in range(2):
        sweeper._swept_at = -float("inf")
        sweeper.sweep_if_due()
    assert {path.name for path in folder.iterdir()} == {".nfs000000000012", "notes.txt", "zz.npy"}
    warned = [record for record in caplog.records if "is no file of samples" in record.getMessage()]
    assert len(warned) == 3


def test_a_file_that_cannot_be_deleted_keeps_no_other(worker: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"samples/01D3XZ3ZHCP3KG9VT4FGAD8KD{k}.npy" for k in range(3)]
    for key in keys:
        worker.artifacts.put(key, [b"old"])
    remove = ArtifactStore.remove

    def fail_for_one(store: ArtifactStore, key: str) -> None:
        if key == keys[1]:
            raise PermissionError(key)
        remove(store, key)

    monkeypatch.setattr(ArtifactStore, "remove", fail_for_one)
    sweep = Round()
    with sweep.part("sweep"):
        Sweeper(worker.registry, worker.artifacts, 1).sweep_if_due()
    assert not sweep.went_well
    assert worker.artifacts.files("samples") == [keys[1]]


@pytest.mark.parametrize(("age", "healthy"), [(1.0, True), (100.0, False)])
def test_the_health_check_knows_a_dispatcher_whose_rounds_fail(
    monkeypatch: pytest.MonkeyPatch, age: float, healthy: bool
) -> None:
    now = 1_800_000_000.0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"timetuner_dispatch_time_seconds {now - age}\n".encode())

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr(dispatcher_health, "Settings", lambda: Settings(dispatcher_metrics_port=server.server_port))
    try:
        if healthy:
            dispatcher_health.main()
        else:
            with pytest.raises(SystemExit, match="the last whole round ended 100 s ago; accepted: up to 60 s"):
                dispatcher_health.main()
    finally:
        server.shutdown()
        server.server_close()
