"""Pipelines that a worker offloads, or balances over devices, give what they give on one device as a whole.

Hooks of accelerate move components and inputs to a processor as to any other device.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from service.registry.tables import JobState, Schedule, TuningJob
from service.shared.settings import Settings
from service.shared.settings_error import SettingsError
from tests.conftest import MakeDatabaseUrl
from tests.pipelines import BY_NAME, ApiAndWorker, Json, api_and_worker, plain, register, request_of
from tests.worker.in_process import InProcess
from timetuner_core.pipelines.placement import OnlyOne, check_balanced, offload
from worker import pipeline_loading
from worker.pipeline_loading import check_placement, load_quietly, placement_of
from worker.tuning import run_tuning_job

pytestmark = pytest.mark.xdist_group("pipelines")

CPU = torch.device("cpu")
PROMPTS = ["a red square on a table", "a bad table", "red on red", "a table on a square", "a square"]
TUNING: Json = {
    "num_steps": 2,
    "prompts": PROMPTS,
    "tuner": {"objective": "pipeline", "total_iters": 1, "num_samples": 1},
    "evaluation": {"num_samples": 16, "teacher_num_steps": 4},
}


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers balances over the processor as over a GPU: each component gets the hooks that it would have there."""
    where = "diffusers.pipelines.pipeline_loading_utils.get_max_memory"
    monkeypatch.setattr(where, lambda _: {CPU: 2**40})


@pytest.fixture(scope="module")
def service(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiAndWorker]:
    with api_and_worker(make_database_url, tmp_path_factory.mktemp("placement")) as both:
        yield both


@pytest.fixture(scope="module")
def registered(service: ApiAndWorker) -> dict[str, tuple[str, Any]]:
    """The ids of models, and the pipelines as they are loaded as a whole."""
    return {name: register(service.worker, name) for name in ("sd15", "flux")}


def placed(service: ApiAndWorker, placement: str) -> InProcess:
    """Another worker on the same registry."""
    home = service.worker.settings.timetuner_home
    return InProcess(home, service.worker.registry, pipeline_placement=placement)


def assert_placed(pipeline: Any, placement: str) -> None:
    hooks = [part._hf_hook for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    if placement == "offload":
        assert {type(hook) for hook in hooks} == {OnlyOne}
    else:
        assert {hook.execution_device for hook in hooks} == {CPU}


@pytest.mark.usefixtures("cpu_as_gpu")
@pytest.mark.parametrize("placement", ["offload", "balanced"])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_requests_that_share_a_placed_pipeline_get_the_images_of_plain_calls(
    service: ApiAndWorker, registered: dict[str, tuple[str, Any]], name: str, placement: str
) -> None:
    kind, (model, pipeline) = BY_NAME[name], registered[name]
    worker = placed(service, placement)
    jobs = {}
    first = 10 if placement == "offload" else 20  # A repeated request would be answered from the store.
    for num_steps, seed in ((4, first), (2, first + 1)):
        request = request_of(kind, model, num_steps=num_steps, seed=seed)
        answer = service.api.post("/v1/samples", json=request, headers={"Prefer": "respond-async"})
        jobs[num_steps, seed] = answer.json()["id"]
    worker.serve()
    assert_placed(worker.runtime.load(model).pipeline, placement)  # type: ignore[union-attr]
    for (num_steps, seed), job in jobs.items():
        content = service.api.get(f"/v1/samples/{job}/content", headers={"Accept": "application/x-npy"}).content
        (image,) = np.load(io.BytesIO(content))
        assert torch.allclose(torch.from_numpy(image), plain(kind, pipeline, seed, num_steps), atol=2e-5)


@pytest.mark.usefixtures("cpu_as_gpu")
def test_a_placed_pipeline_is_tuned_as_one_on_one_device(
    service: ApiAndWorker, registered: dict[str, tuple[str, Any]]
) -> None:
    model, _ = registered["sd15"]
    found = []
    for placement in ("device", "offload", "balanced"):
        worker = placed(service, placement)
        asked = request_of(BY_NAME["sd15"], model, **TUNING)
        asked = {name: value for name, value in asked.items() if name not in ("prompt", "negative_prompt")}
        answer = service.api.post("/v1/tuning-jobs", json=asked)
        assert answer.status_code == 202, answer.text
        worker.runtime.run(TuningJob, answer.json()["id"], run_tuning_job)
        with worker.registry.read() as session:
            job = session.get_one(TuningJob, answer.json()["id"])
            assert job.state == JobState.SUCCEEDED, job.error
            schedule = session.query(Schedule).filter_by(job_id=job.id).one()
            found.append([*schedule.timesteps, *schedule.t_ratios])
    whole, *others = found
    for other in others:
        assert other == pytest.approx(whole, abs=1e-4)


class Part(torch.nn.Module):
    """Notes the device that it was moved to."""

    place = "cpu"

    def to(self, device: Any) -> Any:
        self.place = str(device)
        return self

    def forward(self) -> None:
        pass


def test_one_component_is_on_the_device_whatever_the_order_of_calls() -> None:
    """diffusers' own hooks would leave the encoder there for a request that joins, and the decoder of one that ends."""
    parts = {name: Part() for name in ("text_encoder", "unet", "vae", "checker")}
    pipeline = SimpleNamespace(components=parts, _exclude_from_cpu_offload=["checker"])
    offload(pipeline, torch.device("meta"))
    for name in ("text_encoder", "unet", "text_encoder", "unet", "vae", "unet"):
        parts[name]()
        assert {each for each, part in parts.items() if part.place == "meta"} == {name, "checker"}


def test_auto_offloads_what_the_free_memory_of_the_device_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(pipeline_placement="auto")
    assert placement_of(settings, torch.device("cpu"), 2**60) == "device"
    monkeypatch.setattr(pipeline_loading, "free_bytes", lambda device: 10_000)
    gpu = torch.device("cuda")
    assert [placement_of(settings, gpu, size) for size in (0, 8000, 8001)] == ["device", "device", "offload"]
    assert placement_of(Settings(pipeline_placement="device"), gpu, 8001) == "device"


@pytest.mark.parametrize(
    ("placement", "device", "message"),
    [
        ("offload", "cpu", "PIPELINE_PLACEMENT is 'offload', .* no memory of its own; accepted: auto, device"),
        ("balanced", "cpu", "PIPELINE_PLACEMENT is 'balanced', .* no memory of its own; accepted: auto, device"),
        ("balanced", "cuda:1", "DEVICE|device is 'cuda:1' .* it takes all devices; accepted: DEVICE=cuda"),
        ("offload", "cuda:1", None),
        ("balanced", "cuda", None),
        ("auto", "cpu", None),
    ],
)
def test_a_placement_that_the_device_cannot_have_is_refused(placement: str, device: str, message: str | None) -> None:
    settings = Settings(pipeline_placement=placement, device=device)
    if message is None:
        check_placement(settings, torch.device(device))
        return
    with pytest.raises(SettingsError, match=message):
        check_placement(settings, torch.device(device))


def test_an_unknown_placement_is_refused_and_so_is_a_component_that_fits_no_device() -> None:
    with pytest.raises(SettingsError, match="PIPELINE_PLACEMENT is 'disk'; accepted: 'auto', 'device', 'offload' or"):
        Settings(pipeline_placement="disk")
    for places in ({"unet": 0}, {"unet": 0, "vae": "cpu"}, None):
        pipeline = SimpleNamespace(components={"unet": Part(), "vae": Part()}, hf_device_map=places)
        with pytest.raises(
            MemoryError, match=r"component '(vae|unet)' .* fits no device; accepted: placement 'offload'"
        ):
            check_balanced(pipeline)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("placement", ["offload", "balanced"])
def test_on_gpus_a_placed_pipeline_gives_the_same_images(placement: Any, tmp_path: Path) -> None:
    kind = BY_NAME["sd15"]
    kind.build().save_pretrained(tmp_path)
    gpu = torch.device("cuda")
    whole, other = (load_quietly(tmp_path, gpu, torch.float32, each) for each in ("device", placement))
    assert torch.allclose(plain(kind, other, 1, 2), plain(kind, whole, 1, 2), atol=1e-3)
