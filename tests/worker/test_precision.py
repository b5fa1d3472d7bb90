"""A network runs in another precision than float32 only where the verdict accepted its schedule in that one."""

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from starlette.testclient import TestClient
from torch import Tensor

from service.app import create_app
from service.registry.tables import JobState, SampleJob, Schedule, ScheduleStatus, TuningJob
from tests.conftest import MakeDatabaseUrl
from tests.pipelines import ApiAndWorker, Json, api_and_worker
from tests.worker.in_process import InProcess
from timetuner_core.grids import teacher_timesteps
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers.solver_table import SolverTable, solver_of
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.tuning_setup import EVALUATION_SEEDS
from worker.runtime import pick_dtype
from worker.tuning import run_tuning_job

SETTING: Json = {"num_steps": 3, "sampler": "ddim"}
NUM_HELD_OUT, TEACHER_STEPS = 96, 20
TUNING: Json = {
    "tuner": {"objective": "solver", "total_iters": 4, "population_size": 48, "teacher_num_steps": TEACHER_STEPS},
    "evaluation": {"num_samples": NUM_HELD_OUT, "max_num_samples": NUM_HELD_OUT, "teacher_num_steps": TEACHER_STEPS},
}


@pytest.fixture(scope="module")
def service(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiAndWorker]:
    with api_and_worker(make_database_url, tmp_path_factory.mktemp("precision"), dtype="bfloat16") as both:
        yield both


@pytest.fixture(scope="module")
def schedule(service: ApiAndWorker) -> Json:
    """A schedule that is accepted in bfloat16."""
    model = service.api.post("/v1/models", json={"builtin": "digits8"}).json()["id"]
    return tuned(service, model)


def tuned(service: ApiAndWorker, model: str, **changed: Any) -> Json:
    job = service.api.post("/v1/tuning-jobs", json={"model": model, **SETTING, **TUNING, **changed}).json()["id"]
    service.worker.runtime.run(TuningJob, job, run_tuning_job)
    with service.worker.registry.read() as session:
        stored = session.get_one(TuningJob, job)
        assert stored.state == JobState.SUCCEEDED, stored.error
        schedule_id = session.query(Schedule).filter_by(job_id=job).one().id
    found: Json = service.api.get(f"/v1/schedules/{schedule_id}").json()
    return found


def submitted(api: TestClient, model: str, **request: Any) -> Json:
    answer = api.post("/v1/samples", json={"model": model, **SETTING, **request}, headers={"Prefer": "respond-async"})
    assert answer.status_code in (200, 202), answer.text
    job: Json = answer.json()
    return job


def sampled(service: ApiAndWorker, model: str, **request: Any) -> tuple[Json, NDArray[np.float32]]:
    job = submitted(service.api, model, **request)
    service.worker.serve()
    done = service.api.get(f"/v1/samples/{job['id']}").json()
    assert done["state"] == "succeeded", done["error"]
    content = service.api.get(done["content"], headers={"Accept": "application/x-npy"}).content
    return done, np.load(io.BytesIO(content))


def in_float32(service: ApiAndWorker, used: Json | None, model: str, **request: Any) -> NDArray[np.float32]:
    """The images by a worker that knows no other precision."""
    worker = InProcess(service.worker.settings.timetuner_home, service.worker.registry, dtype="float32")
    job = worker.submit(model, **SETTING, **request, schedule_id=used and used["id"])
    worker.serve()
    return worker.images(job)


def samples_by(schedule: Json, dtype: torch.dtype, seeds: list[int]) -> Tensor:
    """The library's samples with a schedule, in a precision."""
    model = load_builtin("digits8", dtype=dtype)
    grid, table = torch.tensor(schedule["timesteps"], dtype=torch.float64), schedule["solver_table"]
    sampler = solver_of("ddim", SolverTable.from_dict(table), grid)
    return generate(model, Guidance("uncond", 1.0), seeds, None, grid, schedule["t_ratios"], sampler=sampler)


def test_an_accepted_precision_serves_and_the_figures_are_its_own_beside_a_teacher_in_float32(
    service: ApiAndWorker, schedule: Json
) -> None:
    assert schedule["status"] == "accepted", schedule["evaluation"]
    provenance = schedule["provenance"]
    assert (provenance["serves_in"], provenance["tried_in"]) == ("bfloat16", "bfloat16")
    assert provenance["tried"].startswith("accepted: fell: teacher_l2"), provenance
    model = load_builtin("digits8")
    seeds = list(range(EVALUATION_SEEDS, EVALUATION_SEEDS + NUM_HELD_OUT))
    grid = teacher_timesteps(model.noise_schedule, TEACHER_STEPS)
    teacher = generate(model, Guidance("uncond", 1.0), seeds, None, grid, sampler="ddim")
    distance = {
        dtype: float((samples_by(schedule, dtype, seeds) - teacher).flatten(1).norm(dim=1).mean())
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert schedule["evaluation"]["teacher_l2_after"] == pytest.approx(distance[torch.bfloat16], rel=1e-4)
    assert distance[torch.bfloat16] != pytest.approx(distance[torch.float32], rel=2e-4)


def test_requests_with_the_schedule_are_in_its_precision_and_all_others_are_bit_equal_to_float32(
    service: ApiAndWorker, schedule: Json
) -> None:
    model = schedule["model"]
    job, images = sampled(service, model, num_images=25, seed=5)
    assert (job["schedule"], job["dtype"]) == (schedule["id"], "bfloat16")
    with service.worker.registry.read() as session:
        assert [part.dtype for part in session.query(SampleJob).filter_by(parent_id=job["id"])] == ["bfloat16"] * 2
    exact = samples_by(schedule, torch.float32, list(range(5, 30))).numpy()
    assert np.abs(images - exact).mean() < 0.01
    assert np.abs(images - exact).max() > 1e-4
    untuned, images = sampled(service, model, schedule="none", num_images=3, seed=5)
    assert untuned["dtype"] == "float32"
    np.testing.assert_array_equal(images, in_float32(service, None, model, schedule="none", num_images=3, seed=5))
    # What others say of a schedule is no evidence.
    given = {name: schedule[name] for name in ("model", "timesteps", "t_ratios", "solver_table", "provenance")}
    imported = service.api.post("/v1/schedules", json=given | SETTING).json()
    assert imported["provenance"]["serves_in"] == "bfloat16"
    assert submitted(service.api, model, schedule=imported["id"])["dtype"] == "float32"
    # Older versions compared a network in bfloat16 with itself.
    old = Schedule(status=ScheduleStatus.ACCEPTED, provenance={"dtype": "bfloat16"})
    assert old.dtype == "float32"


def test_a_repeated_request_is_answered_from_the_store_under_the_same_precision_only(
    service: ApiAndWorker, schedule: Json
) -> None:
    model, request = schedule["model"], {"num_images": 2, "seed": 77}
    _, images = sampled(service, model, **request)
    again = submitted(service.api, model, **request)
    assert (again["state"], again["dtype"]) == ("succeeded", "bfloat16")
    all_in_float32 = service.worker.settings.model_copy(update={"dtype": "float32"})
    with TestClient(create_app(all_in_float32), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as api:
        other = submitted(api, model, **request)
        assert (other["state"], other["schedule"], other["dtype"]) == ("queued", schedule["id"], "float32")
        service.worker.serve()  # Workers do as the job says.
        found = service.worker.images(other["id"])
        np.testing.assert_array_equal(found, in_float32(service, schedule, model, **request))
        assert not np.array_equal(found, images)
        sampled(service, model, schedule="none", **request)
        assert submitted(api, model, schedule="none", **request)["state"] == "succeeded"


def _fails(*_args: Any) -> Tensor:
    raise NotImplementedError("no kernel for BFloat16")


@pytest.mark.parametrize("fault", ["worse", "fails"])
def test_where_a_precision_is_not_accepted_its_schedule_serves_in_float32_bit_for_bit(
    service: ApiAndWorker, schedule: Json, fault: str
) -> None:
    model, runtime = schedule["model"], service.worker.runtime
    held = runtime.load_model(model, torch.bfloat16)
    network = _fails if fault == "fails" else lambda *inputs: 1.1 * held.network(*inputs)
    runtime._models[model, torch.bfloat16] = replace(held, network=network)
    try:
        other = tuned(service, model, seed=1, tuner={**TUNING["tuner"], "total_iters": 1})
    finally:
        runtime._models[model, torch.bfloat16] = held
    assert (other["status"], other["provenance"]["serves_in"]) == ("accepted", "float32")
    said = "failed: no kernel for BFloat16" if fault == "fails" else "rejected: worse than in float32: teacher_l2"
    assert other["provenance"]["tried"].startswith(said)
    assert other["evaluation"]["reason"].startswith("fell: teacher_l2")
    job, images = sampled(service, model, schedule=other["id"], num_images=2, seed=3)
    assert job["dtype"] == "float32"
    np.testing.assert_array_equal(images, in_float32(service, other, model, num_images=2, seed=3))


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [("auto", "cuda", torch.bfloat16), ("auto", "cpu", torch.float32), ("float16", "cuda", torch.float16)],
)
def test_auto_is_bfloat16_where_a_gpu_has_it(
    name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert pick_dtype(name, torch.device(device)) == dtype
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    assert pick_dtype("auto", torch.device("cuda")) == torch.float32
