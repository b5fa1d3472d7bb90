"""Every kind of model and sampler, tuned and sampled over HTTP."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

from service.shared.arrays import encode_array
from tests.core.conftest import save_model
from tests.core.test_model_kinds import CONDITION_DIM, condition_unet, dit, save_dit
from tests.service.problems import assert_problem
from tests.service.test_models import upload, zipped
from tests.stack import ENOUGH, SMALLEST, Json, Stack
from timetuner_core.samplers import SAMPLERS

NPY = {"Accept": "application/x-npy"}
QUICK: Json = {
    "tuner": {"total_iters": 2, "population_size": 16, "batch_size": 8, "teacher_num_steps": 8},
    "evaluation": SMALLEST,
}


def sample(stack: Stack, model: str, **request: Any) -> np.ndarray[Any, Any]:
    response = stack.client.post("/v1/samples", json={"model": model, "num_steps": 4, **request}, headers=NPY)
    assert response.status_code == 200, response.text
    images: np.ndarray[Any, Any] = np.load(io.BytesIO(response.content))
    return images


@pytest.fixture
def text_model(stack: Stack, tmp_path: Path) -> str:
    """A U-Net conditioned on arrays, as a text encoder would give them."""
    save_model(tmp_path, condition_unet())
    generator = torch.Generator().manual_seed(0)
    conditions = torch.randn((6, 2, CONDITION_DIM), generator=generator)
    save_file({"conditions": conditions, "uncond_condition": conditions[:1] * 0}, tmp_path / "data.safetensors")
    model_id: str = upload(stack.client, zipped(tmp_path)).json()["id"]
    return model_id


@pytest.mark.parametrize("sampler", [*SAMPLERS, "own_midpoint"])
def test_every_sampler_samples_repeatably_from_a_seed(stack: Stack, sampler: str) -> None:
    model = stack.register("mixture-ring")
    both = sample(stack, model, sampler=sampler, num_images=2, seed=5)
    assert np.isfinite(both).all()
    assert np.array_equal(sample(stack, model, sampler=sampler, num_images=1, seed=6)[0], both[1])


@pytest.mark.parametrize(
    ("sampler", "tuner"),
    [
        ("heun", {"objective": "end_to_end"}),
        ("own_midpoint", {"objective": "end_to_end"}),  # Another installed package has this one.
        ("unipc_2", {"objective": "end_to_end"}),
        ("dpmpp_2m", {"objective": "next_eps", "tune_type": "sequential"}),
        ("dpmpp_2m_sde", {"objective": "next_eps", "tune_type": "sequential"}),
        ("ddpm", {"objective": "next_eps"}),
    ],
)
def test_a_schedule_for_another_sampler_is_kept_apart_and_sampled(stack: Stack, sampler: str, tuner: Json) -> None:
    model = stack.register("mixture-ring")
    request = {**QUICK, "tuner": {**QUICK["tuner"], **tuner}}
    schedule = stack.tune(model, num_steps=4, sampler=sampler, timesteps="log_snr", **request)
    assert schedule["sampler"] == sampler
    assert np.ptp(np.diff(schedule["timesteps"])) > 0.1  # not the uniform grid
    assert sample(stack, model, sampler=sampler, schedule=schedule["id"]).shape == (1, 2)


def test_schedules_are_resolved_by_guidance_interval_and_rescale(stack: Stack) -> None:
    model = stack.register("mixture-ring")
    guidance = {"guidance_type": "classifier-free", "guidance_scale": 2, "guidance_end": 0.9}
    schedule = stack.tune(model, num_steps=6, **guidance, **ENOUGH)
    assert schedule["status"] == "accepted"

    def resolve(**change: Any) -> Json | None:
        query = {"model": model, "num_steps": 6, **guidance, **change}
        schedule: Json | None = stack.client.get("/v1/schedules/resolve", params=query).json()["schedule"]
        return schedule

    assert resolve() == schedule
    assert resolve(guidance_rescale=0.1) is resolve(guidance_end=1000) is resolve(guidance_start=0.01) is None
    body = {"num_steps": 5, "class_labels": 0, "schedule": "none", **guidance}
    plain = sample(stack, model, **body)
    for change in ({"guidance_end": 1000}, {"guidance_start": 0.5}, {"guidance_rescale": 0.1}):
        assert not np.array_equal(sample(stack, model, **body | change), plain)


def test_each_request_is_clipped_as_it_says_though_they_share_a_worker(stack: Stack) -> None:
    model = stack.register("digits8")
    assert stack.client.get(f"/v1/models/{model}").json()["spec"]["clipping"] == "none"
    bodies = [{"seed": 3, "num_images": 2, "clipping": clipping} for clipping in (None, "clip_sample_range=0.25")]
    # Both wait at once, so that the worker finds them together.
    request = {"model": model, "num_steps": 4}
    headers = {"Prefer": "respond-async"}
    jobs = [stack.client.post("/v1/samples", json=request | body, headers=headers).json() for body in bodies]
    contents = [stack.finished(job, "samples")["content"] for job in jobs]
    plain, clipped = (np.load(io.BytesIO(stack.client.get(c, headers=NPY).content)) for c in contents)
    # The last step ends at t_min, where x is x0 and a hundredth of eps, whose values are below 5.
    assert np.abs(clipped).max() <= 0.25 + 0.01 * 5
    assert np.abs(plain).max() > 0.5
    assert np.array_equal(sample(stack, model, **bodies[0] | {"clipping": "none"}), plain)


def test_a_schedule_is_for_the_clipping_that_it_was_tuned_with(stack: Stack) -> None:
    model, clipping = stack.register("digits8"), {"clipping": "clip_sample_range=0.9"}
    schedule = stack.tune(model, num_steps=4, **QUICK, clipping="clip_sample_range=0.90")
    assert schedule["clipping"] == clipping["clipping"]
    stored = {name: schedule[name] for name in ("num_steps", "timesteps", "t_ratios")}
    imported = [
        stack.client.post("/v1/schedules", json={"model": model, **stored, **how}).json()
        for how in (clipping, {"clipping": None}, {"clipping": "none"})
    ]
    assert [each["clipping"] for each in imported] == ["clip_sample_range=0.9", None, "none"]
    assert imported[0]["version"] == schedule["version"] + 1
    for query, expected in (({"clipping": "own"}, imported[1]), (clipping, imported[0])):
        filters = {"model": model, "num_steps": 4, "status": "imported", "limit": 1, **query}
        assert stack.client.get("/v1/schedules", params=filters).json()["items"] == [expected]
    named = {"model": model, "num_steps": 4, "schedule": schedule["id"]}
    assert_problem(stack.client.post("/v1/samples", json=named), 422, "clipping", "accepted: clip_sample_range=0.9")
    assert stack.client.post("/v1/samples", json=named | clipping).status_code == 200


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"clipping": "clip_sample"}, "accepted: a number above 0"),
        ({"clipping": "clip_sample_range=1", "sampler": "euler"}, "accepted: null for the sampler 'euler'"),
        ({"clipping": "none", "sampler": "ipndm"}, "accepted: null for the sampler 'ipndm'"),
        ({"clipping": "clip_sample_range=1", "sampler": "dpmpp_2m"}, "accepted: without clip_sample_range"),
    ],
)
def test_a_clipping_that_the_sampler_does_not_do_is_refused(stack: Stack, change: Json, accepted: str) -> None:
    body = {"model": stack.register("digits8"), "num_steps": 4, **change}
    for path in ("/v1/samples", "/v1/tuning-jobs"):
        assert_problem(stack.client.post(path, json=body), 422, "clipping", accepted)


def test_the_latent_model_is_tuned_in_latent_space_and_sampled_decoded(stack: Stack) -> None:
    model = stack.register("digits32-ldm")
    spec = stack.client.get(f"/v1/models/{model}").json()["spec"]
    assert spec["image_shape"] == [1, 32, 32]
    assert spec["sample_shape"] != spec["image_shape"]
    guidance = {"guidance_type": "classifier-free", "guidance_scale": 2}
    schedule = stack.tune(model, num_steps=4, **guidance, **QUICK)
    assert schedule["evaluation"]["frechet_after"] > 0
    body = {"model": model, "num_steps": 4, "num_images": 4, "class_labels": 3, "schedule": schedule["id"], **guidance}
    response = stack.client.post("/v1/samples", json=body, headers={"Accept": "image/png"})
    assert response.headers["timetuner-schedule"] == schedule["id"]
    assert Image.open(io.BytesIO(response.content)).size == (130, 130)


def test_a_text_model_is_tuned_and_sampled_with_arrays(stack: Stack, text_model: str) -> None:
    guidance = {"guidance_type": "classifier-free", "guidance_scale": 3}
    schedule = stack.tune(text_model, num_steps=4, **guidance, **QUICK)
    assert len(schedule["t_ratios"]) == 4
    prompts = np.random.default_rng(0).normal(size=(2, 2, CONDITION_DIM)).astype(np.float32)
    arrays = {"condition": encode_array(prompts), "uncond_condition": encode_array(prompts[:1] * 0)}
    both = sample(stack, text_model, num_images=2, **guidance, **arrays)
    assert both.shape == (2, 1, 4, 4)
    second = sample(stack, text_model, seed=1, **guidance, **arrays | {"condition": encode_array(prompts[1:])})
    np.testing.assert_allclose(both[1], second[0], rtol=1e-3)  # kernels round by batch size
    other = sample(stack, text_model, seed=1, **guidance, **arrays | {"condition": encode_array(prompts[:1])})
    assert not np.allclose(both[1], other[0], rtol=1e-2)


def test_a_transformer_is_registered_tuned_and_sampled(stack: Stack, tmp_path: Path) -> None:
    network = dit()
    network.proj_out_2.weight.mul_(0.05)  # A network of random outputs has no teacher that is fit to judge by.
    save_dit(tmp_path, network)
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")  # type: ignore[no-untyped-call]
    model = upload(stack.client, zipped(tmp_path)).json()["id"]
    guidance = {"guidance_type": "classifier-free", "guidance_scale": 2}
    assert len(stack.tune(model, num_steps=4, **guidance, **QUICK)["t_ratios"]) == 4
    assert sample(stack, model, class_labels=[0, 2], num_images=2, **guidance).shape == (2, 1, 4, 4)


WRONG_ROWS = encode_array(np.zeros((3, 2, CONDITION_DIM), np.float32))
HUGE = base64.b64encode(
    b"\x93NUMPY\x01\x00F\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999,)}".ljust(69) + b"\n"
).decode()
GUIDED = {"guidance_type": "classifier-free", "guidance_scale": 2}


@pytest.mark.parametrize(
    ("change", "field", "accepted"),
    [
        ({}, "condition", f"(1 or 2, 2, {CONDITION_DIM})"),
        ({"condition": "not base64!"}, "condition", "base64 .npy"),
        ({"condition": "aGVsbG8="}, "condition", "base64 .npy"),
        ({"condition": "UEsDBBQAAAAIAA=="}, "condition", "base64 .npy"),
        ({"condition": HUGE}, "condition", "base64 .npy"),
        ({"condition": WRONG_ROWS}, "condition", f"(1 or 2, 2, {CONDITION_DIM})"),
        ({"condition": encode_array(np.zeros((1, 2, 3), np.float32))}, "condition", f", {CONDITION_DIM})"),
        ({"condition": encode_array(np.zeros((1, 2, CONDITION_DIM)))}, "condition", "float32"),
        ({"condition": encode_array(np.full((1, 2, CONDITION_DIM), np.nan, np.float32))}, "condition", "finite"),
        ({"class_labels": 1}, "class_labels", "condition"),
    ],
)
def test_a_bad_condition_is_refused(stack: Stack, text_model: str, change: Json, field: str, accepted: str) -> None:
    body = {"model": text_model, "num_steps": 4, "num_images": 2, **GUIDED, **change}
    assert_problem(stack.client.post("/v1/samples", json=body), 422, field, accepted)


def test_a_model_without_an_unconditional_condition_is_guided_by_one_that_is_sent(stack: Stack, tmp_path: Path) -> None:
    save_model(tmp_path, condition_unet())
    model = upload(stack.client, zipped(tmp_path)).json()["id"]
    prompt = encode_array(np.ones((1, 3, CONDITION_DIM), np.float32))
    body = {"model": model, "num_steps": 4, **GUIDED, "condition": prompt}
    assert_problem(stack.client.post("/v1/samples", json=body), 422, "guidance_scale", "uncond_condition")
    alone = sample(stack, model, **GUIDED | {"guidance_scale": 1}, condition=prompt)
    guided = sample(stack, model, **GUIDED, condition=prompt, uncond_condition=prompt)
    np.testing.assert_allclose(alone, guided, rtol=1e-3)
    assert_problem(stack.client.post("/v1/tuning-jobs", json={"model": model, "num_steps": 4, **GUIDED}), 422)


TOO_MUCH: list[Json] = [
    {
        "num_steps": 999,
        "tuner": {"objective": "next_eps", "spread": False, "batch_size": 1024, "teacher_num_steps": 1000},
    },
    {"num_steps": 99, "tuner": {"total_iters": 10_000, "batch_size": 1024, "teacher_num_steps": 100}},
]


@pytest.mark.parametrize("request_", TOO_MUCH)
def test_a_tuning_job_of_too_much_work_is_refused(stack: Stack, request_: Json) -> None:
    body = {"model": stack.register("digits8"), "evaluation": {"teacher_num_steps": 1000}, **GUIDED, **request_}
    assert_problem(stack.client.post("/v1/tuning-jobs", json=body), 413, "tuner", "accepted: ")


@pytest.mark.parametrize(
    ("path", "change", "field"),
    [
        ("samples", {"timesteps": [1.0, 0.5]}, "timesteps"),
        ("samples", {"timesteps": [1.0, 0.5, 0.6, 0.2, 0.1], "schedule": "none"}, "timesteps"),
        ("samples", {"timesteps": "log_snr"}, "timesteps"),
        ("samples", {"sampler": "heun", "eta": 0.5}, "eta"),
        ("samples", {"guidance_start": 0.5, "guidance_end": 0.4, "class_labels": 0, **GUIDED}, "guidance_start"),
        ("samples", {"guidance_rescale": 0.5}, "guidance_rescale"),
        ("tuning-jobs", {"timesteps": [2.0, 0.5, 0.4, 0.2, 0.1]}, "timesteps"),
        ("tuning-jobs", {"sampler": "ddpm"}, "sampler"),
        ("tuning-jobs", {"sampler": "deis", "tuner": {"objective": "next_eps"}}, "tune_type"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(stack: Stack, path: str, change: Json, field: str) -> None:
    body = {"model": stack.register("mixture-ring"), "num_steps": 4, **change}
    assert_problem(stack.client.post(f"/v1/{path}", json=body), 422, field)
