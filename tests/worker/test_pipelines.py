"""Whole pipelines through the service: requests to the API, a worker in this process, and plain calls beside them."""

import base64
import copy
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from service.client.results import Schedule as ClientSchedule
from service.registry.tables import JobState, TuningJob
from tests.conftest import MakeDatabaseUrl
from tests.pipelines import BY_NAME, SIZE, Json, api_and_worker, call_of, data_url, picture, plain, register, request_of
from tests.worker.in_process import InProcess
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from worker import pipeline_sampling
from worker.lease import JobCancelledError
from worker.pipeline_loading import load_quietly
from worker.pipeline_sampling import PipelineBatch, PipelineRow
from worker.tuning import run_tuning_job

pytestmark = pytest.mark.xdist_group("pipelines")

NPY = {"Accept": "application/x-npy"}
ASYNC = {"Prefer": "respond-async"}


class Service:
    """The API and a worker in this process."""

    def __init__(self, api: TestClient, worker: InProcess) -> None:
        self.api, self.worker = api, worker
        self._models: dict[str, tuple[str, Any]] = {}

    def model(self, name: str) -> str:
        return self._registered(name)[0]

    def pipeline(self, name: str) -> Any:
        return self._registered(name)[1]

    def _registered(self, name: str) -> tuple[str, Any]:
        if name not in self._models:
            self._models[name] = register(self.worker, name)
        return self._models[name]

    def submit(self, name: str, **changed: Any) -> str:
        """The id of a new job."""
        answer = self.api.post(
            "/v1/samples", json=request_of(BY_NAME[name], self.model(name), **changed), headers=ASYNC
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def refused(self, name: str, **changed: Any) -> str:
        """Why a request is refused, after the name of the field."""
        answer = self.api.post(
            "/v1/samples", json=request_of(BY_NAME[name], self.model(name), **changed), headers=ASYNC
        )
        assert answer.status_code == 422, answer.text
        error = answer.json()["errors"][0]
        return ".".join(map(str, error["loc"][1:])) + ": " + str(error["msg"])

    def images(self, job_id: str) -> NDArray[np.float32]:
        answer = self.api.get(f"/v1/samples/{job_id}/content", headers=NPY)
        assert answer.status_code == 200, answer.text
        array: NDArray[np.float32] = np.load(io.BytesIO(answer.content))
        return array


@pytest.fixture(scope="module")
def service(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with api_and_worker(make_database_url, tmp_path_factory.mktemp("pipelines")) as (api, worker):
        yield Service(api, worker)


@pytest.mark.parametrize(
    "name", ["sd15", "sdxl", "sd3", "flux", "pixart-sigma", "wan", "ddpm", "sd15-img2img", "sd15-inpaint"]
)
def test_a_served_image_is_that_of_a_plain_call(service: Service, name: str) -> None:
    kind, pipeline = BY_NAME[name], service.pipeline(name)
    job = service.submit(name, num_images=2, seed=7)
    service.worker.serve()
    assert service.worker.job(job).state == JobState.SUCCEEDED, service.worker.job(job).error
    images = service.images(job)
    assert images.dtype == np.float32
    for k, image in enumerate(images):
        expected = plain(kind, pipeline, 7 + k, kind.num_steps)
        assert torch.allclose(torch.from_numpy(image), expected, atol=2e-5), name
    assert not np.allclose(images[0], images[1], atol=1e-2)


PROMPTS = ["a red square on a table", "a bad table", "red on red", "a table on a square", "a square"]
# The least that goes through all phases.
SMALLEST: Json = {
    "num_steps": 2,
    "prompts": PROMPTS,
    "tuner": {"objective": "pipeline", "total_iters": 2, "num_samples": 1},
    "evaluation": {"num_samples": 16, "teacher_num_steps": 6},
}


def tuning_request(service: Service, name: str, **changed: Any) -> Json:
    request = request_of(BY_NAME[name], service.model(name), **SMALLEST)
    del request["prompt"]
    return request | changed


def tune(service: Service, name: str, **changed: Any) -> Json:
    """A tuning job that this process has run, as the API shows it."""
    answer = service.api.post("/v1/tuning-jobs", json=tuning_request(service, name, **changed))
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    service.worker.runtime.run(TuningJob, job_id, run_tuning_job)
    job: Json = service.api.get(f"/v1/tuning-jobs/{job_id}").json()
    return job


def used(service: Service, name: str, kind: str) -> NDArray[np.float64]:
    """The network calls, rows and device seconds of all jobs of a kind on a model."""
    items = service.api.get("/v1/usage", params={"model": service.model(name)}).json()["items"]
    figures = ("network_calls", "network_rows", "device_seconds")
    return np.array([sum(item[figure] for item in items if item["kind"] == kind) for figure in figures])


@pytest.fixture(scope="module")
def tuned(service: Service) -> Json:
    """A schedule of two steps that was tuned on a Stable Diffusion."""
    before = used(service, "sd15", "tuning")
    job = tune(service, "sd15", negative_prompt="bad")
    assert job["state"] == "succeeded", job["error"]
    calls, rows, seconds = used(service, "sd15", "tuning") - before
    assert (
        0 < calls <= rows == service.api.get(f"/v1/schedules/{job['schedule']}").json()["evaluation"]["network_calls"]
    )
    assert 0 < seconds <= job["elapsed_seconds"]
    assert job["request"]["sampler"] == "dpmpp_2m"
    assert [phase["name"] for phase in job["phases"]] == ["teacher", "start", "tuning", "evaluation"]
    assert all(phase["done"] <= phase["total"] for phase in job["phases"])
    assert len(job["steps"]) == 2
    schedule: Json = service.api.get(f"/v1/schedules/{job['schedule']}").json()
    return schedule


def test_a_tuned_schedule_says_what_it_is_for_and_repeats_no_prompt(service: Service, tuned: Json) -> None:
    assert tuned["status"] == "accepted"
    assert (tuned["guidance_scale"], tuned["call"]) == (3.0, {"height": SIZE, "width": SIZE})
    evaluation, distances = tuned["evaluation"], tuned["provenance"]["distances"]
    assert evaluation["teacher_l2_after"] < evaluation["teacher_l2_before"]
    assert evaluation["metrics"]["teacher_l2_untuned"]["before"] == distances["untuned"]
    assert evaluation["metrics"]["teacher_l2_native"]["after"] == distances["tuned"] == evaluation["teacher_l2_after"]
    assert evaluation["num_samples"] == 16 and evaluation["teacher_num_steps"] == 6
    assert evaluation["network_calls"] > 0
    assert tuned["provenance"]["prompts"]["count"] == len(PROMPTS)
    text = json.dumps(tuned)
    assert not [prompt for prompt in (*PROMPTS, '"bad"') if prompt in text]


def test_a_tuned_schedule_is_used_by_auto_at_its_own_sizes_and_guidance_only(service: Service, tuned: Json) -> None:
    kind, pipeline = BY_NAME["sd15"], service.pipeline("sd15")

    def schedule_of(**changed: Any) -> Any:
        job_id = service.submit("sd15", num_steps=2, **changed)
        return service.api.get(f"/v1/samples/{job_id}").json()["schedule"]

    assert schedule_of() == tuned["id"]
    assert schedule_of(prompt="a bad table", negative_prompt="red", height=SIZE, width=SIZE) == tuned["id"]
    assert schedule_of(sampler="dpmpp_2m") == tuned["id"]
    others: list[Json] = [{"height": 2 * SIZE}, {"guidance_scale": 4}, {"sampler": "ddim"}, {"schedule": "none"}]
    for changed in (*others, {"call": {"guidance_rescale": 0.5}}):
        assert schedule_of(**changed) is None, changed
    by_id = service.submit("sd15", num_steps=2, schedule=tuned["id"], height=2 * SIZE, width=2 * SIZE, seed=3)
    service.worker.serve()
    pipeline.scheduler = (own := pipeline.scheduler)
    try:
        pipeline.scheduler = TimeTunerScheduler.from_schedule(own, tuned)
        expected = plain(kind, pipeline, 3, 2, height=2 * SIZE, width=2 * SIZE)
    finally:
        pipeline.scheduler = own
    assert torch.allclose(torch.from_numpy(service.images(by_id)[0]), expected, atol=2e-5)


def test_a_schedule_of_several_sizes_and_guidance_scales_serves_all_between(service: Service, tuned: Json) -> None:
    intervals: Json = {"sizes": [[SIZE, SIZE], [3 * SIZE, SIZE]], "guidance_scale": 1.5, "guidance_scales": [1.5, 3]}
    job = tune(service, "sd15", **intervals, num_steps=3)
    assert job["state"] == "succeeded", job["error"]
    schedule: Json = service.api.get(f"/v1/schedules/{job['schedule']}").json()
    assert schedule["call"] == {"height": [SIZE, 3 * SIZE], "width": SIZE}
    assert (schedule["guidance_scale"], schedule["guidance_scales"]) == (1.5, [1.5, 3])
    assert [each["guidance_scale"] for each in schedule["evaluation"]["at_scales"]] == [1.5, 2.25, 3]
    assert schedule["status"] == "accepted"
    setting: Json = {"model": service.model("sd15"), "num_steps": 3, "guidance_scale": 2}

    def resolve(**changed: Any) -> Json:
        found: Json = service.api.get("/v1/schedules/resolve", params={**setting, **changed}).json()
        return found

    for height in (SIZE, 2 * SIZE, 3 * SIZE):
        assert resolve(height=height)["schedule"]["id"] == schedule["id"]
        assert resolve(height=height, sampler="dpmpp_2m")["schedule"]["id"] == schedule["id"]
    tall = resolve(height=4 * SIZE)
    assert tall["schedule"] is None
    assert f"height is {4 * SIZE}, tuned for [{SIZE}, {3 * SIZE}]" in tall["reason"]
    strong = resolve(height=SIZE, guidance_scale=3.5)
    assert strong["schedule"] is None
    assert "guidance_scale is 3.5, tuned for 1.5 to 3" in strong["reason"]
    for changed in ({"width": 2 * SIZE}, {"sampler": "ddim"}, {"call": '{"guidance_rescale": 0.5}'}):
        assert resolve(**changed)["schedule"] is None, changed
    job_id = service.submit("sd15", num_steps=3, guidance_scale=2, height=2 * SIZE)
    assert service.api.get(f"/v1/samples/{job_id}").json()["schedule"] == schedule["id"]
    service.worker.serve()
    playground = service.api.get(f"/playground?model={service.model('sd15')}").text
    assert f'name="height" value="{SIZE}"' in playground, "a form has one size"

    content = service.api.get(f"/v1/schedules/{schedule['id']}/export", params={"format": "json"}).json()
    assert content["sizes"] == [[SIZE, SIZE], [3 * SIZE, SIZE]]
    assert content["guidance_scales"] == [1.5, 3]
    for request in (content, ClientSchedule.model_validate(schedule).to_import()):
        answer = service.api.post("/v1/schedules", json=request)
        assert answer.status_code == 201, answer.text
        assert answer.json()["call"] == schedule["call"]
        assert answer.json()["guidance_scales"] == schedule["guidance_scales"]


def test_resolving_says_what_does_not_match(service: Service, tuned: Json) -> None:
    setting: Json = {"model": service.model("sd15"), "num_steps": 2, "guidance_scale": 3}

    def resolve(**changed: Any) -> Json:
        answer = service.api.get("/v1/schedules/resolve", params={**setting, **changed})
        assert answer.status_code == 200, answer.text
        found: Json = answer.json()
        return found

    assert resolve()["schedule"]["id"] == tuned["id"]
    found = resolve(width=2 * SIZE, call='{"guidance_rescale": 0.5}')
    assert found["schedule"] is None
    assert f"the nearest, {tuned['id']}, does not match: " in found["reason"]
    assert f"width is {2 * SIZE}, tuned for {SIZE}" in found["reason"]
    assert "call.guidance_rescale is 0.5, tuned for not given" in found["reason"]
    assert "guidance_scale is 4, tuned for 3" in resolve(guidance_scale=4)["reason"]


def test_an_interrupted_job_ends_with_the_numbers_of_an_unbroken_one(service: Service, tuned: Json) -> None:
    runtime, saved = service.worker.runtime, list[Json]()
    answer = service.api.post("/v1/tuning-jobs", json=tuning_request(service, "sd15", negative_prompt="bad"))
    job_id = answer.json()["id"]

    def stop_after_an_iteration() -> None:
        with service.worker.registry.read() as session:
            if state := session.get_one(TuningJob, job_id).pipeline_state:
                saved.append(state)
                runtime.stopping.set()

    runtime.settings.save_seconds, runtime.give_way = 1e-6, stop_after_an_iteration
    try:
        runtime.run(TuningJob, job_id, run_tuning_job)
    finally:
        runtime.stopping.clear()
        runtime.give_way = lambda: None
    job = service.api.get(f"/v1/tuning-jobs/{job_id}").json()
    assert (job["state"], saved[0]["iterations"]) == ("queued", 1)
    assert runtime.run(TuningJob, job_id, run_tuning_job)
    job = service.api.get(f"/v1/tuning-jobs/{job_id}").json()
    schedule = service.api.get(f"/v1/schedules/{job['schedule']}").json()
    for name in ("timesteps", "t_ratios", "solver_table", "score"):
        assert schedule[name] == tuned[name], name


def test_a_tuning_job_is_cancelled_at_a_step(service: Service) -> None:
    runtime = service.worker.runtime
    answer = service.api.post("/v1/tuning-jobs", json=tuning_request(service, "sd15", seed=5))
    job_id = answer.json()["id"]

    def cancel() -> None:
        raise JobCancelledError(job_id)

    runtime.give_way = cancel
    try:
        runtime.run(TuningJob, job_id, run_tuning_job)
    finally:
        runtime.give_way = lambda: None
    assert service.api.get(f"/v1/tuning-jobs/{job_id}").json()["state"] == "cancelled"
    assert not [thread for thread in threading.enumerate() if "(_work)" in thread.name]


def test_requests_of_4_8_and_5_steps_share_calls(service: Service) -> None:
    kind, pipeline = BY_NAME["sd15"], service.pipeline("sd15")
    served: Any = service.worker.runtime.load(service.model("sd15"))
    before, published = served.shared.num_calls, service.worker.bus.published
    rows, used_before = served.shared.num_rows, used(service, "sd15", "sampling")
    published.clear()
    jobs = {steps: service.submit("sd15", num_steps=steps, seed=40 + steps) for steps in (4, 8, 5)}
    service.worker.serve()
    assert served.shared.num_calls - before <= 9  # The first shared call of a kind may be checked by one more.
    calls_used, rows_used, _ = used(service, "sd15", "sampling") - used_before
    assert calls_used == pytest.approx(served.shared.num_calls - before)
    assert rows_used == pytest.approx(served.shared.num_rows - rows)
    told = [event["steps"] for event in published if isinstance(event, dict)]
    for steps, job_id in jobs.items():
        assert [event[job_id] for event in told if job_id in event] == [[k, steps] for k in range(1, steps + 1)]
        expected = plain(kind, pipeline, 40 + steps, steps)
        assert torch.allclose(torch.from_numpy(service.images(job_id)[0]), expected, atol=2e-5)


def test_runs_join_and_leave_at_any_step_and_one_that_is_cancelled_or_fails_ends_no_other(service: Service) -> None:
    kind, pipeline = BY_NAME["sd15"], service.pipeline("sd15")
    served: Any = service.worker.runtime.load(service.model("sd15"))
    rows = list[int]()
    batch = PipelineBatch(served, 8, lambda count, calls: rows.append(count))

    def row(owner: str, num_steps: int, seed: int, **changed: Any) -> PipelineRow:
        call = {**call_of(kind), "output_type": "np", "num_inference_steps": num_steps, **changed}
        return PipelineRow(owner, seed, call, lambda: copy.deepcopy(pipeline.scheduler))

    other = PipelineBatch(served, 8, lambda count, calls: rows.append(count))
    other.add([row("another batch's", 9, 7)])
    batch.add([row("first", 4, 1), row("first", 4, 2), row("cancelled", 6, 3)])
    first = batch.step()
    assert {(str(each.row.owner), each.step, each.num_steps) for each in first.travelling} == {
        ("first", 1, 4),
        ("cancelled", 1, 6),
    }
    batch.add([row("later", 3, 4), row("failing", 3, 5, prompt=5), row("other size", 4, 6, height=2 * SIZE)])
    done: dict[tuple[str, int], torch.Tensor] = {}
    failed = {each.owner: error for each, error in batch.step().failed}
    batch.discard("cancelled")
    while batch.rows:
        advance = batch.step()
        failed |= {each.owner: error for each, error in advance.failed}
        if advance.images is not None:
            done |= {
                (str(each.owner), each.seed): image for each, image in zip(advance.done, advance.images, strict=True)
            }
    assert list(failed) == ["failing"]
    assert set(done) == {("first", 1), ("first", 2), ("later", 4), ("other size", 6)}
    for (owner, seed), image in done.items():
        steps = {"first": 4, "later": 3, "other size": 4}[owner]
        size = {"height": 2 * SIZE} if owner == "other size" else {}
        assert torch.allclose(image, plain(kind, pipeline, seed, steps, **size), atol=2e-5), owner
    assert sum(rows) > 0
    batch.close()
    # The end of a batch is none of another batch's runs.
    (left,) = other.rows
    assert not left.result.is_over
    while other.rows:
        advance = other.step()
    assert advance.images is not None
    assert torch.allclose(advance.images[0], plain(kind, pipeline, 7, 9), atol=2e-5)
    other.close()


def test_one_run_makes_images_of_several_jobs_and_goes_on_when_one_of_them_is_cancelled(service: Service) -> None:
    kind, pipeline = BY_NAME["sd15"], service.pipeline("sd15")
    served: Any = service.worker.runtime.load(service.model("sd15"))
    batch = PipelineBatch(served, 8, lambda count, calls: None)
    call = {**call_of(kind), "output_type": "np", "num_inference_steps": 3}

    def row(owner: str, seed: int, prompt: str) -> PipelineRow:
        own = {**call, "prompt": prompt}
        return PipelineRow(owner, seed, own, lambda: copy.deepcopy(pipeline.scheduler), True, "its own", 3 * SIZE**2)

    prompts = {"first": "a red square on a table", "cancelled": "red", "last": "a table"}
    batch.add([row(owner, seed, prompts[owner]) for seed, owner in enumerate(["first", "first", "cancelled", "last"])])
    asked = served.shared.num_asked
    batch.step()
    batch.discard("cancelled")
    advance = batch.step()
    shown = batch.preview(advance, [0, 2])
    assert shown is not None
    assert shown.shape == (2, 3, SIZE, SIZE)
    advance = batch.step()
    assert served.shared.num_asked - asked == 3
    assert [(row.owner, row.seed) for row in advance.done] == [("first", 0), ("first", 1), ("last", 3)]
    assert advance.images is not None
    for made, image in zip(advance.done, advance.images, strict=True):
        expected = plain(kind, pipeline, made.seed, 3, prompt=prompts[str(made.owner)])
        assert torch.allclose(image, expected, atol=2e-5), made.owner


def test_images_whose_common_run_fails_get_a_run_each(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_an_error(calls: Any, seeds: Any) -> Json:
        return {**several(calls, seeds), **({"height": "no number"} if len(calls) > 1 else {})}

    several = pipeline_sampling.call_of_several
    served: Any = service.worker.runtime.load(service.model("sd15"))
    monkeypatch.setattr(served, "takes_several", True)
    monkeypatch.setattr(pipeline_sampling, "call_of_several", with_an_error)
    job = service.submit("sd15", num_images=2, seed=90, schedule="none")
    service.worker.serve()
    assert not served.takes_several
    for k, image in enumerate(service.images(job)):
        expected = plain(BY_NAME["sd15"], service.pipeline("sd15"), 90 + k, BY_NAME["sd15"].num_steps)
        assert torch.allclose(torch.from_numpy(image), expected, atol=2e-5)


def captured_x0(pipeline: Any, kind: Any, seed: int, step: int) -> torch.Tensor:
    """The prediction of a plain run's own scheduler in a step, from the network's output there."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    found, own_step = [], scheduler.step

    def noted(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        if hasattr(scheduler, "scale_noise"):
            sigma = scheduler.sigmas[len(found)]
            found.append(sample - sigma * model_output)
        else:
            alpha_bar = scheduler.alphas_cumprod[int(timestep)]
            found.append((sample - (1 - alpha_bar).sqrt() * model_output) / alpha_bar.sqrt())
        return own_step(model_output, timestep, sample, **options)

    scheduler.step = noted
    replaced = copy.copy(pipeline)
    replaced.__dict__["scheduler"] = scheduler
    plain(kind, replaced, seed, 5)
    return found[step - 1]


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_preview_is_the_picture_of_what_a_step_predicts(service: Service, name: str) -> None:
    kind, pipeline = BY_NAME[name], service.pipeline(name)
    served: Any = service.worker.runtime.load(service.model(name))
    batch = PipelineBatch(served, 8, lambda rows, calls: None)
    call = {**call_of(kind), "output_type": "np", "num_inference_steps": 5}
    batch.add([PipelineRow("job", 3, call, lambda: copy.deepcopy(pipeline.scheduler), is_previewed=True)])
    calls, last = served.shared.num_calls, batch.step()
    assert batch.preview(batch.step(), [0]) is not None
    advance = batch.step()
    assert served.shared.num_calls == calls + 3  # A preview calls no network.
    preview = batch.preview(advance, [0])
    assert preview is not None
    x0 = captured_x0(pipeline, kind, 3, advance.travelling[0].step)
    if name == "flux":
        x0 = pipeline._unpack_latents(x0, SIZE, SIZE, pipeline.vae_scale_factor)
    config = pipeline.vae.config
    decoded = pipeline.vae.decode(x0 / config.scaling_factor + (config.shift_factor or 0)).sample.detach().clamp(-1, 1)
    assert torch.allclose(preview, decoded, atol=2e-5)
    while batch.rows:
        last = batch.step()
    assert last.images is not None
    assert torch.allclose(last.images[0], plain(kind, pipeline, 3, 5), atol=2e-5)
    batch.close()


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_previews_are_published_with_each_step(service: Service, name: str) -> None:
    job = service.submit(name, previews=True, seed=11)
    published = len(service.worker.bus.published)
    service.worker.serve()
    assert service.worker.job(job).state == JobState.SUCCEEDED, service.worker.job(job).error
    events = [event for event in service.worker.bus.published[published:] if isinstance(event, dict)]
    pictures = [event["previews"][job] for event in events if job in event["previews"]]
    assert len(pictures) >= BY_NAME[name].num_steps
    assert all(Image.open(io.BytesIO(base64.b64decode(each))).format == "PNG" for each in pictures if each)
    assert sum(each is not None for each in pictures) >= BY_NAME[name].num_steps - 1


def test_a_request_needs_no_more_than_a_model_and_a_prompt(service: Service) -> None:
    answer = service.api.post("/v1/samples", json={"model": service.model("sd15"), "prompt": "a table"}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    request = answer.json()["request"]
    assert (request["num_steps"], request["sampler"], request["guidance_scale"]) == (50, "own", 7.5)
    assert (request["height"], request["width"], request["call"]) == (SIZE, SIZE, {})
    # A value that equals a default is as if left out: the request is the same.
    same = {"num_steps": 50, "sampler": "own", "guidance_scale": 7.5, "height": SIZE, "call": {"guidance_rescale": 0}}
    body = {"model": service.model("sd15"), "prompt": "a table", **same}
    assert service.api.post("/v1/samples", json=body, headers=ASYNC).json()["request"] == request
    service.api.post(f"/v1/samples/{answer.json()['id']}/cancel")


def test_a_flagged_image_is_said(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = iter([False, True])
    served: Any = service.worker.runtime.load(service.model("sd15"))
    monkeypatch.setitem(served.spec, "flags_content", True)
    monkeypatch.setattr("worker.pipeline_sampling._is_flagged", lambda *_: next(flags))
    job_id = service.submit("sd15", num_images=2, seed=77)
    service.worker.serve()
    assert service.api.get(f"/v1/samples/{job_id}").json()["flagged"] == [1]
    assert service.api.get(f"/v1/samples/{job_id}/content", headers=NPY).headers["TimeTuner-Flagged"] == "1"
    again = service.submit("sd15", num_images=2, seed=77)  # The same images are found, and so is what was said of them.
    assert service.api.get(f"/v1/samples/{again}").json()["flagged"] == [1]


def test_frames_come_as_arrays_and_no_video(service: Service) -> None:
    job_id = service.submit("wan", seed=8)
    service.worker.serve()
    frames = service.images(job_id)
    assert frames.ndim == 5 and frames.shape[2:] == (3, SIZE, SIZE)
    refused = service.api.get(f"/v1/samples/{job_id}/content", headers={"Accept": "video/mp4"})
    assert refused.status_code == 406
    assert "accepted for this model: application/x-npy, application/json" in refused.json()["detail"]
    body = request_of(BY_NAME["wan"], service.model("wan"))
    assert service.api.post("/v1/samples", json=body, headers={"Accept": "video/mp4"}).status_code == 406


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("sd15", {"prompt": None}, "prompt: prompt is missing"),
        ("sd15", {"height": 17}, "height: height is 17; accepted: a multiple of 8"),
        ("sd15", {"guidance_type": "classifier-free"}, "guidance_type: guidance_type is classifier-free; accepted"),
        ("sd15", {"guidance_rescale": 0.5}, "guidance_rescale: guidance_rescale is 0.5; accepted for a pipeline: 0"),
        ("sd15", {"eta": 0.5}, "eta: eta is 0.5; accepted for a pipeline: 0"),
        ("sd15", {"clipping": "none"}, "clipping: clipping is none; accepted for a pipeline: null"),
        ("sd15", {"class_labels": 1}, "class_labels: class_labels is given; accepted for a pipeline: null"),
        ("sd15", {"sampler": "heun"}, "sampler: sampler is 'heun'; accepted for a pipeline"),
        ("sd15", {"timesteps": "uniform"}, "timesteps: timesteps is given, and the sampler 'own' has its own"),
        ("sd15", {"num_steps": 1001}, "num_steps: num_steps is 1001; accepted: 1 to 1000"),
        (
            "sd15",
            {"call": {"guidence": 1}},
            "call.guidence: call.guidence is no argument of this pipeline; accepted: ",
        ),
        ("sd15", {"call": {"prompt": "a"}}, "call.prompt: call.prompt is a field of its own; accepted: prompt beside"),
        (
            "sd15",
            {"call": {"guidance_rescale": "much"}},
            "call.guidance_rescale: call.guidance_rescale is a str; accepted: a finite number",
        ),
        (
            "sd15",
            {"call": {"guidance_rescale": True}},
            "call.guidance_rescale: call.guidance_rescale is True; accepted: a finite number",
        ),
        ("ddpm", {"prompt": "a"}, "prompt: prompt is given; accepted: null, as this pipeline takes none"),
        ("ddpm", {"height": 16}, "height: height is 16; accepted: null for this pipeline"),
        ("ddpm", {"guidance_scale": 2}, "guidance_scale: guidance_scale is 2, and this pipeline takes none"),
        ("sd15-img2img", {"call": {}}, "call.image: call.image is missing; accepted: a data URL of a PNG"),
        ("sd15-img2img", {"call": {"image": "cat.png"}}, "call.image: call.image is a str; accepted: a data URL"),
        (
            "sd15-img2img",
            {"call": {"image": "data:image/gif;base64,R0lG"}},
            "call.image: call.image is a str; accepted",
        ),
        (
            "sd15-img2img",
            {"call": {"image": "data:image/png;base64,AAAA"}},
            "call.image: call.image is a str; accepted",
        ),
        (
            "sd15-img2img",
            {"call": {"image": data_url(picture()), "strength": 0}},
            "call.strength: call.strength is 0; accepted: above 0, up to 1",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_pipeline_does_not_take_is_refused_by_name(
    service: Service, name: str, changed: Json, expected: str
) -> None:
    assert service.refused(name, **changed).startswith(expected)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"prompts": ["a", "a"]}, "prompts: prompts has 1 different one; accepted: 2 or more"),
        ({"prompts": ["a", " "]}, "prompts.1: prompts[1] is empty; accepted: a text"),
        ({"tuner": {"objective": "solver"}}, "tuner.objective: tuner.objective is 'solver'; accepted for a pipeline"),
        ({"sampler": "own"}, "sampler: "),
        ({"sizes": [[16, 16], [24, 17]]}, "sizes.1: sizes[1] is [24, 17]; accepted: multiples of 8"),
        ({"sizes": [[16, 16], [24, 24]], "width": 16}, "width: width is 16; accepted beside sizes: null"),
        ({"sizes": [[16, 16]]}, "sizes: "),
        ({"sampler": "ddpm"}, "sampler: sampler is 'ddpm'; accepted for a pipeline: ddim, euler"),
        ({"timesteps": "uniform"}, "timesteps: timesteps is given"),
        ({"call": {"eta": 0.5}}, "call.eta: call.eta is no argument of this pipeline"),
        ({"evaluation": {"max_num_samples": 32}}, "evaluation.max_num_samples: evaluation.max_num_samples is 32"),
        ({"num_steps": 50, "evaluation": {}}, "evaluation.teacher_num_steps: evaluation.teacher_num_steps is 50"),
    ],
    ids=str,
)
def test_a_tuning_job_that_does_not_fit_is_refused_by_name(service: Service, changed: Json, expected: str) -> None:
    answer = service.api.post("/v1/tuning-jobs", json=tuning_request(service, "sd15", **changed))
    assert answer.status_code == 422, answer.text
    error = answer.json()["errors"][0]
    assert (".".join(map(str, error["loc"][1:])) + ": " + error["msg"]).startswith(expected)


def test_what_cannot_be_tuned_says_why(service: Service) -> None:
    model_id, _ = register(service.worker, "ddim", tunable="it was trained for few steps")
    answer = service.api.post("/v1/tuning-jobs", json={"model": model_id, "num_steps": 2})
    assert "model cannot be tuned: it was trained for few steps" in answer.json()["detail"]
    body = {"model": model_id, "num_steps": 2, "sampler": "ddim"}
    assert "accepted: 'own' for this pipeline: it was" in service.api.post("/v1/samples", json=body).json()["detail"]


@pytest.mark.parametrize(
    "changed",
    [{"prompt": "a"}, {"negative_prompt": "a"}, {"height": 8}, {"width": 8}, {"call": {"a": 1}}, {"sampler": "own"}],
    ids=lambda changed: str(next(iter(changed))),
)
def test_a_network_takes_nothing_of_a_pipeline(service: Service, changed: Json) -> None:
    model_id = service.api.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
    answer = service.api.post("/v1/samples", json={"model": model_id, "num_steps": 2, **changed}, headers=ASYNC)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"][1] == next(iter(changed))
    missing = service.api.post("/v1/samples", json={"model": model_id}, headers=ASYNC)
    assert missing.json()["errors"][0]["loc"] == ["body", "num_steps"]
    tuner = {"model": model_id, "num_steps": 2, "tuner": {"objective": "pipeline"}}
    assert service.api.post("/v1/tuning-jobs", json=tuner).json()["errors"][0]["loc"] == ["body", "tuner", "objective"]


def test_a_prompt_beyond_the_limit_is_refused_and_neither_cut_off_nor_logged(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "table " * 40 + "secret"
    with caplog.at_level("INFO"):
        job_id = service.submit("sd15", prompt=secret)
        service.submit("flux", prompt="secret table", seed=99)
        service.worker.serve()
    job = service.api.get(f"/v1/samples/{job_id}").json()
    assert (job["state"], job["error"]) == (
        "failed",
        "prompt has 43 tokens; accepted: up to 16, its start and end among them",
    )
    assert "secret" not in caplog.text
    job = tune(service, "sd15", prompts=[secret, "a"])
    assert job["error"] == "prompt has 43 tokens; accepted: up to 16, its start and end among them"


def test_pages_show_prompts_as_text_and_ask_for_them(service: Service, tuned: Json) -> None:
    script = "<script>alert(1)</script>"
    request = tuning_request(service, "sd15", prompts=[script, "b"], negative_prompt=script)
    job_id = service.api.post("/v1/tuning-jobs", json=request).json()["id"]
    page = service.api.get(f"/jobs/{job_id}").text
    assert script not in page and page.count("&lt;script&gt;alert(1)") == 2
    service.api.post(f"/v1/tuning-jobs/{job_id}/cancel")
    model = service.model("sd15")
    playground = service.api.get(f"/playground?model={model}").text
    assert '<textarea name="prompt"' in playground and 'maxlength="8000"' in playground
    guided = re.search(r'name="guidance_scale" value="([\d.]+)"', playground)
    assert guided is not None and guided[1] in ("1.5", "2", "3"), "it begins with a setting that has a schedule"
    assert service.api.get(f"/models/{model}").status_code == 200
    page = service.api.get(f"/schedules/{tuned['id']}").text
    assert re.search(rf'href="/playground\?[^"]*model={model}', page) and "guidance ×3" in page
    # A form without more than its usual fields makes a job of the pipeline's own tuner.
    form = {"model": model, "num_steps": "2", "sampler": "dpmpp_2m", "guidance_scale": "7.5", "objective": ""}
    made = service.api.post("/jobs", data=form, headers={"Origin": "http://127.0.0.1"}, follow_redirects=False)
    assert made.status_code == 303, made.text
    job = service.api.get(f"/v1/tuning-jobs/{made.headers['Location'].rpartition('/')[2]}").json()
    assert job["request"]["tuner"]["objective"] == "pipeline"


def test_a_strength_that_leaves_no_step_is_refused(service: Service) -> None:
    call = {"image": data_url(picture()), "strength": 0.2}
    job_id = service.submit("sd15-img2img", num_steps=4, call=call)
    service.worker.serve()
    error = service.api.get(f"/v1/samples/{job_id}").json()["error"]
    assert error == "strength is 0.2, which leaves none of 4 steps; accepted: a larger strength, or more num_steps"


def test_encoded_prompts_are_remembered_between_requests(service: Service) -> None:
    served: Any = service.worker.runtime.load(service.model("sd15"))
    calls, counts = list[int](), list[int]()
    hook = served.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        for seed in (501, 502):
            service.submit("sd15", prompt="a red table", seed=seed)
            service.worker.serve()
            counts.append(len(calls))
    finally:
        hook.remove()
    assert counts[0] == counts[1] > 0


def test_the_cost_counts_pixels_frames_and_steps(service: Service) -> None:
    most = service.worker.settings.max_pixel_steps
    steps = most // (3 * 4096 * 4096) + 1
    body = request_of(BY_NAME["sd15"], service.model("sd15"), height=4096, width=4096, num_steps=steps)
    refused = service.api.post("/v1/samples", json=body, headers=ASYNC)
    assert refused.status_code == 413
    assert f"is {3 * 4096 * 4096 * steps}; accepted: up to {most}" in refused.json()["detail"]


def test_loading_draws_no_bars_into_the_log(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    BY_NAME["sd15"].build().save_pretrained(tmp_path)
    capfd.readouterr()
    load_quietly(tmp_path, torch.device("cpu"), torch.float32)
    assert "".join(capfd.readouterr()) == ""
