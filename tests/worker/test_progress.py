"""A tuning job's progress: all its phases are counted, so that it never stands still for long."""

from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient
from torch import Tensor

from service.app import create_app
from service.registry.database import Registry
from service.registry.tables import TuningJob, TuningJobEvent
from service.shared.queue import celery_app
from service.shared.settings import Settings
from tests.conftest import MakeDatabaseUrl
from timetuner_core.models.mixtures import GaussianMixture
from worker.runtime import Runtime
from worker.tuning import run_tuning_job
from worker.tuning_progress import Phase, TuningProgress

SMALL = {"num_samples": 64, "max_num_samples": 64, "teacher_num_steps": 20, "batch_size": 16}
PER_STEP = {"population_size": 64, "total_iters": 8, "data": "generated", "teacher_num_steps": 10}
TUNERS: dict[str, dict[str, Any]] = {
    "end to end": {"total_iters": 20, "population_size": 32, "teacher_num_steps": 20},
    "from a given grid": {"total_iters": 20, "population_size": 32, "teacher_num_steps": 20, "start": "given"},
    "solver": {"objective": "solver", "total_iters": 4, "population_size": 32, "teacher_num_steps": 20},
    "per step": {"objective": "next_eps", "tune_type": "sequential", "tolerance": 1e-6, **PER_STEP},
    "ays": {"objective": "ays", "num_candidates": 8, "population_size": 64, "num_samples": 16},
    "gits": {"objective": "gits", "num_candidates": 8, "population_size": 32},
    "dmn": {"objective": "dmn"},
    "grid": {"objective": "grid"},
}
# A job is told to cost at most so many times what it does. Tuners may stop early.
MOST_OVER_ROWS = 1.5
PHASES = {
    "end to end": ["teacher", "start", "tuning", "evaluation"],
    "solver": ["teacher", "start", "tuning", "evaluation"],
    "from a given grid": ["teacher", "tuning", "evaluation"],
    "per step": ["teacher", "tuning", "evaluation"],
}


@pytest.fixture
def settings(make_database_url: MakeDatabaseUrl, tmp_path: Path) -> Settings:
    """Progress is stored before each network call."""
    url = make_database_url("sqlite", tmp_path)
    broker_url = "redis://127.0.0.1:1/0"
    return Settings(timetuner_home=tmp_path, database_url=url, broker_url=broker_url, device="cpu", save_seconds=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        *("end to end", "solver", "per step", "ays", "grid"),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("from a given grid", "gits", "dmn")),
    ],
)
def test_all_phases_count_and_none_is_long_without_progress(
    name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, rows, count, called = 0, 0, TuningProgress.count, GaussianMixture.__call__

    def counted(progress: TuningProgress) -> None:
        nonlocal calls
        calls += 1
        count(progress)

    def counting_rows(network: GaussianMixture, x: Tensor, *args: Any) -> Tensor:
        nonlocal rows
        rows += len(x)
        return called(network, x, *args)

    monkeypatch.setattr(TuningProgress, "count", counted)
    monkeypatch.setattr(GaussianMixture, "__call__", counting_rows)
    with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        model = client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
        request = {"model": model, "num_steps": 4, "tuner": TUNERS[name], "evaluation": SMALL}
        price = client.post("/v1/tuning-groups", json={"jobs": [request], "dry_run": True}).json()["cost"]
        job = client.post("/v1/tuning-jobs", json=request).json()["id"]
        before = client.get(f"/v1/tuning-jobs/{job}").json()
        assert (before["phase"], before["phases"], before["elapsed_seconds"]) == (None, [], None)
        assert client.get(f"/jobs/{job}").status_code == 200
        runtime = Runtime(settings, celery_app(settings.broker_url))
        assert runtime.run(TuningJob, job, run_tuning_job)
        runtime.registry.close()
        after = client.get(f"/v1/tuning-jobs/{job}").json()
        page = client.get(f"/jobs/{job}", headers={"Accept": "text/html"}).text
    assert after["state"] == "succeeded", after["error"]
    events = progress_events(settings, job)
    expected = PHASES.get(name, ["teacher", "tuning", "evaluation"])
    assert [phase for phase, _ in groupby(event["phase"] for event in events)] == expected
    shares = [0.0, *(event["progress"] for event in events), 1.0]
    steps = [later - earlier for earlier, later in pairwise(shares)]
    assert min(steps) >= 0
    assert max(steps) < 0.1
    longest_stand = max(len(list(same)) for _, same in groupby(shares))
    assert longest_stand < 0.1 * len(shares)
    assert [phase["name"] for phase in after["phases"]] == expected
    assert all(phase["done"] == phase["total"] for phase in after["phases"][:-1])
    assert after["phases"][-1]["done"] > 0.95 * after["phases"][-1]["total"]
    without_calls = name in ("dmn", "grid")  # The tuning is a phase of one call all the same.
    assert sum(phase["total"] for phase in after["phases"]) == calls + without_calls
    # The cost that was told holds all phases: teacher, grids to start from, tuning, evaluation and the teacher's check.
    assert rows <= price < MOST_OVER_ROWS * rows
    assert after["elapsed_seconds"] > 0
    assert after["remaining_seconds"] is None  # It is over.
    assert all(event["remaining_seconds"] >= 0 for event in events[1:])
    assert all(f">{name} <span" in page for name in expected)
    assert ">took " in page


def test_an_evaluation_that_takes_more_noises_says_how_many_calls_are_left() -> None:
    progress = TuningProgress([Phase("tuning", 1), Phase("evaluation", 2)], save_seconds=60)
    progress.enter("evaluation")
    for _ in range(2):
        progress.count()
    progress.evaluate_more(2)
    assert (progress.phase.done, progress.phase.total) == (2, 4)
    assert progress.remaining_seconds is not None
    assert progress.remaining_seconds > 0


def progress_events(settings: Settings, job_id: str) -> list[dict[str, Any]]:
    registry = Registry(settings.database_url)
    query = select(TuningJobEvent.data).where(TuningJobEvent.job_id == job_id, TuningJobEvent.type == "progress")
    with registry.read() as session:
        found = list(session.scalars(query.order_by(TuningJobEvent.id)))
    registry.close()
    return found
