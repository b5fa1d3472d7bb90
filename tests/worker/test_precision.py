"""The precision that a schedule was evaluated in is known, and the log tells where it is used in another."""

from pathlib import Path

import pytest
import torch

from service.registry.database import Registry
from service.registry.tables import JobState, Schedule, TuningJob
from service.shared.job_requests import TuningJobRequest
from tests.worker.in_process import InProcess
from worker.runtime import pick_dtype
from worker.tuning import run_tuning_job

SMALL = {"population_size": 4, "teacher_num_steps": 4, "total_iters": 1, "start": "given"}
EVALUATION = {"num_samples": 16, "max_num_samples": 16, "teacher_num_steps": 4, "batch_size": 16}


def test_a_schedule_says_what_it_was_evaluated_in_and_the_log_where_it_samples_in_another(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuning = InProcess(tmp_path, registry, dtype="bfloat16")
    model = tuning.model("digits8")
    request = TuningJobRequest.model_validate(
        {"model": model, "num_steps": 2, "tuner": {"objective": "end_to_end", **SMALL}, "evaluation": EVALUATION}
    )
    with registry.write() as session:
        job = TuningJob(model_id=model, request=request.model_dump(mode="json"))
        session.add(job)
    tuning.runtime.run(TuningJob, job.id, run_tuning_job)
    with registry.read() as session:
        assert session.get_one(TuningJob, job.id).state == JobState.SUCCEEDED
        schedule = session.query(Schedule).one()
    assert schedule.provenance["dtype"] == "bfloat16"
    tuning.submit(model, num_steps=2, schedule=schedule.id, schedule_id=schedule.id)
    tuning.serve()
    assert "was evaluated in" not in caplog.text
    other = InProcess(tmp_path, registry, dtype="float32")
    for seed in (1, 2):
        other.submit(model, num_steps=2, seed=seed, schedule=schedule.id, schedule_id=schedule.id)
        other.serve()
    [line] = [line for line in caplog.messages if "was evaluated in" in line]
    assert f"schedule {schedule.id} was evaluated in bfloat16, and samples in float32 here" in line
    for worker in (tuning, other):
        worker.close()


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
