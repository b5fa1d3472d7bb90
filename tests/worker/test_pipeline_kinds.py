"""Each kind of pipeline on its way through the service: registered, sampled, tuned, exported, run in a fresh process.

The table in docs/models.md has a row for each kind; a test compares the two.
"""

import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from safetensors.torch import load_file
from starlette.testclient import TestClient

from service.registry.models import next_registration
from service.registry.tables import JobState, ModelRegistration, TuningJob
from service.schedules import exporting
from tests.conftest import MakeDatabaseUrl
from tests.core.pipelines.kinds import KINDS, Kind
from tests.core.pipelines.run import EXPORTED, one_thread, run
from tests.pipelines import Json, api_and_worker, call_of, plain, request_of
from tests.worker.in_process import InProcess
from timetuner_core.exports.__main__ import answer
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.pipelines import tuning
from timetuner_core.pipelines.inspecting import inspect_pipeline
from timetuner_core.pipelines.loading import load_pipeline
from timetuner_core.pipelines.schedule import PipelineSchedule
from timetuner_core.pipelines.trial import try_pipeline
from timetuner_core.pipelines.tuning import tune_pipeline
from worker import registering_pipelines
from worker.registering import register
from worker.tuning import run_tuning_job

pytestmark = pytest.mark.xdist_group("pipelines")

ASYNC = {"Prefer": "respond-async"}
PROMPTS = ["a red square on a table", "a bad table", "red on red", "a table on a square", "a square"]
CONSISTENCY = Kind(
    "consistency",
    "ConsistencyModelPipeline",
    lambda: {
        "unet": next(kind for kind in KINDS if kind.name == "ddpm").parts()["unet"],
        "scheduler": CMStochasticIterativeScheduler(),
    },
    lambda: {"output_type": "pt"},
)
NOT_REGISTERED = {
    "kandinsky22": "image_embeds",
}
FOR_FEW_STEPS = ("lcm", "consistency")
REGISTERED = [kind for kind in (*KINDS, CONSISTENCY) if kind.name not in NOT_REGISTERED]


def cells_of(kind: Kind) -> list[str]:
    """A kind's row in docs/models.md: what the tests below do with it."""
    call = kind.call()
    registered, tuned = kind.name not in NOT_REGISTERED, kind.name not in FOR_FEW_STEPS
    service = "yes" if registered else "no"
    image = next((name for name in ("mask_image", "strength", "image") if name in call), None)
    return [
        kind.name,
        f"`{kind.pipeline}`",
        service,
        service,
        ("yes" if registered else "in the library") if tuned else "no",
        "yes" if tuned and registered else "no",
        "yes" if "prompt" in call else "no",
        {"strength": "image to image", "mask_image": "inpainting", "image": "controlled by it", None: "no"}[image],
    ]


def test_the_page_of_models_says_what_these_tests_do() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = [
        line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("| ") and "Pipeline`" in line
    ]
    assert rows == [cells_of(kind) for kind in (*KINDS, CONSISTENCY)]


def with_two_held_out(*args: Any, **options: Any) -> PipelineSchedule:
    """Tune with as few held-out images as an interval takes. A request may ask for 16 or more."""
    return tune_pipeline(*args, **{**options, "num_held_out": 2})


class Way:
    """The API and a worker in this process, and the folder of the operator's pipelines."""

    def __init__(self, folder: Path, api: TestClient, worker: InProcess, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.api, self.worker, self.patch = folder, api, worker, patch
        self.exported: dict[str, torch.Tensor] = {}  # Each pipeline's images with its exported scheduler are in here.

    def save(self, kind: Kind) -> Path:
        kind.build().save_pretrained(self.folder / kind.name)
        return self.folder / kind.name

    def register(self, kind: Kind) -> Json:
        """The end of a pipeline that is handed in. It is tried at the kind's sizes, as videos are large."""
        self.patch.setattr(
            registering_pipelines, "try_pipeline", lambda pipeline, spec: try_pipeline(pipeline, spec, **call_of(kind))
        )
        accepted = self.api.post("/v1/models", json={"path": kind.name}, headers=ASYNC)
        assert accepted.status_code == 202, accepted.text
        with self.worker.registry.read() as session:
            waiting = next_registration(session)
        assert waiting is not None
        self.worker.runtime.run(ModelRegistration, waiting, register)
        found: Json = self.api.get(accepted.headers["Location"]).json()
        return found

    def sample(self, request: Json) -> torch.Tensor:
        answered = self.api.post("/v1/samples", json=request, headers=ASYNC)
        assert answered.status_code == 202, answered.text
        self.worker.serve()
        job = self.worker.job(answered.json()["id"])
        assert job.state == JobState.SUCCEEDED, job.error
        return torch.from_numpy(self.worker.images(job.id)[0].copy())

    def tune(self, kind: Kind, model: str) -> Json:
        """The schedule of a job that this process has run."""
        tuner = {"objective": "pipeline", "total_iters": 1, "num_samples": 1}
        request = request_of(kind, model, tuner=tuner, evaluation={"num_samples": 16, "teacher_num_steps": 5})
        if request.pop("prompt", None):
            request["prompts"] = PROMPTS
        answered = self.api.post("/v1/tuning-jobs", json=request)
        assert answered.status_code == 202, answered.text
        job_id = answered.json()["id"]
        self.worker.runtime.run(TuningJob, job_id, run_tuning_job)
        job = self.api.get(f"/v1/tuning-jobs/{job_id}").json()
        assert job["state"] == "succeeded", job["error"]
        schedule: Json = self.api.get(f"/v1/schedules/{job['schedule']}").json()
        return schedule

    def export(self, schedule: Json, folder: Path) -> None:
        """Unpack the exported scheduler within a pipeline's folder."""
        answered = self.api.get(f"/v1/schedules/{schedule['id']}/export", params={"format": "diffusers"})
        assert answered.status_code == 200, answered.text
        with zipfile.ZipFile(io.BytesIO(answered.content)) as archive:
            archive.extractall(folder / EXPORTED)


@pytest.fixture(scope="module")
def way(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    folder = tmp_path_factory.mktemp("kinds")
    models = folder / "models"
    with pytest.MonkeyPatch.context() as patch, one_thread():
        # The child processes that inspect and export are tested elsewhere. Each takes seconds to start.
        patch.setattr(registering_pipelines, "inspect_in_child", inspect_pipeline)
        patch.setattr(exporting, "_run", answer)
        patch.setattr(tuning, "tune_pipeline", with_two_held_out)
        with api_and_worker(make_database_url, folder, models_dir=models) as (api, worker):
            yield Way(models, api, worker, patch)


@pytest.mark.parametrize("kind", REGISTERED, ids=lambda kind: kind.name)
def test_a_kind_is_registered_sampled_tuned_and_exported(way: Way, kind: Kind) -> None:
    folder = way.save(kind)
    model = way.register(kind)
    assert model["state"] == "ready", model["problem"]
    pipeline = load_pipeline(folder)
    request = request_of(kind, model["id"], seed=3)
    served = way.sample(request)
    torch.testing.assert_close(served, plain(kind, pipeline, 3, kind.num_steps), atol=2e-5, rtol=0)
    if kind.name in FOR_FEW_STEPS:
        assert "trained for few steps" in model["spec"]["tunable"] or "LCM" in model["spec"]["tunable"]
        return
    schedule = way.tune(kind, model["id"])
    tuned = way.sample({**request, "schedule": schedule["id"], "sampler": schedule["sampler"]})
    way.export(schedule, folder)
    pipeline.scheduler = TimeTunerScheduler.from_pretrained(folder / EXPORTED, subfolder="scheduler")
    torch.testing.assert_close(tuned, plain(kind, pipeline, 3, kind.num_steps), atol=2e-5, rtol=0)
    assert not torch.allclose(tuned, served, atol=1e-4), "the schedule made no difference"
    way.exported[kind.name] = run(kind, pipeline)


@pytest.mark.timeout(900)
def test_a_fresh_process_runs_every_kind_with_its_exported_scheduler(way: Way) -> None:
    """It needs the kinds that were exported before it."""
    if not way.exported:
        pytest.skip("no kind was exported before")
    subprocess.run([sys.executable, "-m", "tests.core.pipelines.run", way.folder, *way.exported], check=True)
    loaded = load_file(way.folder / "outputs.safetensors")
    assert loaded.keys() == way.exported.keys()
    for name, output in way.exported.items():
        difference = float((loaded[name] - output).abs().max())
        assert difference <= 1e-4 * max(1.0, float(output.abs().max())), name
