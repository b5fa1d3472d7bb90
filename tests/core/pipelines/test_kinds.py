"""`TimeTunerScheduler` in 44 kinds of pipelines: the native scheduler's samples on its own grid, and saved pipelines.

Every kind is built once. One worker runs them all, in one thread: threads cost tiny networks more than they save.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.core.pipelines.kinds import KINDS, REFUSED, Kind
from tests.core.pipelines.run import one_thread, run
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.models.folder_files import ModelFormatError
from timetuner_core.models.schedulers import grid_of as grid_of_scheduler
from timetuner_core.pipelines.inspecting import inspect_pipeline
from timetuner_core.pipelines.loading import load_pipeline

pytestmark = pytest.mark.xdist_group("pipelines")

MAX_DIFFERENCE = 4e-5


class Native(NamedTuple):
    """A pipeline as it came, what it gave, and the grid its scheduler used."""

    pipeline: Any
    output: Tensor
    grid: list[float]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def natives() -> dict[str, Native]:
    """Those built so far."""
    return {}


def native(kind: Kind, natives: dict[str, Native]) -> Native:
    if kind.name not in natives:
        pipeline = kind.build()
        output = run(kind, pipeline)
        natives[kind.name] = Native(pipeline, output, grid_of(pipeline.scheduler))
    return natives[kind.name]


def grid_of(scheduler: Any) -> list[float]:
    """The times of a native scheduler's last run, `(num_steps + 1,)`."""
    steps = scheduler.config.num_train_timesteps
    if hasattr(scheduler, "scale_noise"):  # flow matching
        schedule = TimeTunerScheduler.from_schedule(scheduler, {"timesteps": [1.0, 0.0]}).noise_schedule
        return schedule.time_of_model_input(steps * scheduler.sigmas.double()).tolist()
    ends_at_first_step = type(scheduler).__name__ == "DDIMScheduler" and not scheduler.config.set_alpha_to_one
    return [(int(t) + 1) / steps for t in scheduler.timesteps] + [1 / steps if ends_at_first_step else 0.0]


def tuned(kind: Kind, before: Native, t_ratios: list[float] | None) -> Any:
    """The pipeline with our scheduler on the native grid, which starts from the same noise as the native one does."""
    own = before.pipeline.scheduler
    base = own.config["base_scheduler"]["_class_name"] if isinstance(own, TimeTunerScheduler) else type(own).__name__
    schedule = {"timesteps": before.grid, "t_ratios": t_ratios, "sampler": kind.sampler}
    scheduler = TimeTunerScheduler.from_schedule(own, schedule)
    if base != "FlowMatchEulerDiscreteScheduler":
        # Ours scales the noise by what a grid that starts below T takes. DDIM and Euler with the spacing "leading",
        # whose x is ours times sqrt(1 + sigma^2), start from a standard deviation of 1 on every grid.
        scheduler.init_noise_sigma = 1.0
    before.pipeline.scheduler = scheduler
    return before.pipeline


# A request can give no embeddings of images. test_inspecting.py has its refusal.
NOT_REGISTERED = ("kandinsky22",)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name not in NOT_REGISTERED], ids=lambda kind: kind.name
)
def test_a_saved_pipeline_is_described_and_loaded(kind: Kind, natives: dict[str, Native], tmp_path: Path) -> None:
    """This test is the first one, so that pipelines have the schedulers that they came with."""
    before = native(kind, natives)
    before.pipeline.save_pretrained(tmp_path)
    spec = inspect_pipeline(tmp_path)
    scheduler = type(before.pipeline.scheduler).__name__
    assert (spec["pipeline"], spec["scheduler"], spec["dtype"]) == (kind.pipeline, scheduler, "float32")
    assert (spec["tunable"] is None) == (kind.name != "lcm")
    given = {"prompt", "negative_prompt", "image", "mask_image", "class_labels", "height", "guidance_scale", "strength"}
    assert spec["call"].keys() >= given & kind.call().keys()
    torch.testing.assert_close(run(kind, load_pipeline(tmp_path)), before.output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_untuned_samples_are_the_native_schedulers(kind: Kind, natives: dict[str, Native]) -> None:
    before = native(kind, natives)
    untuned = run(kind, tuned(kind, before, None))
    assert bool(torch.isfinite(untuned).all())
    assert float((untuned - before.output).abs().max()) <= MAX_DIFFERENCE


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_whose_noise_schedule_is_unknown_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelFormatError, match="accepted: "):
        TimeTunerScheduler(REFUSED[name], [1.0, 0.5, 0.0])


def test_a_strength_that_leaves_no_step_is_refused(natives: dict[str, Native]) -> None:
    for kind in (by_name("sd15-img2img"), by_name("sdxl-img2img")):
        pipeline = tuned(kind, native(kind, natives), None)
        with pytest.raises(ValueError, match=r"`strength` of 0\.333 or more leaves a step"):
            pipeline(num_inference_steps=3, **{**kind.call(), "strength": 0.1})


@pytest.mark.parametrize("name", ["sd15", "sd15-img2img"])
def test_heun_is_that_of_diffusers_in_a_pipeline_also_from_the_middle(name: str) -> None:
    """Each step has two calls of the network, but the last."""
    kind = by_name(name)
    pipeline = kind.build()
    native = diffusers.HeunDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    native.set_timesteps(kind.num_steps)
    own = TimeTunerScheduler.from_schedule(native, {"timesteps": [1.0, 0.0]}).noise_schedule
    grid = grid_of_scheduler(native, own, kind.num_steps)
    assert grid is not None
    ours = TimeTunerScheduler.from_schedule(native, {"timesteps": grid.tolist(), "sampler": "heun"})
    ours.init_noise_sigma = 1.0  # `tuned` does the same.
    outputs = []
    for scheduler in (native, ours):
        pipeline.scheduler = scheduler
        outputs.append(run(kind, pipeline))
    assert float((outputs[1] - outputs[0]).abs().max()) <= MAX_DIFFERENCE


def test_sdxl_can_stop_early(natives: dict[str, Native]) -> None:
    """`denoising_end` reads num_train_timesteps from the scheduler's configuration."""
    kind = by_name("sdxl")
    before = native(kind, natives)
    native_scheduler = diffusers.EulerDiscreteScheduler.from_config(before.pipeline.scheduler.config)
    pipeline = tuned(kind, before, None)
    early = run(kind, pipeline, denoising_end=0.5)
    pipeline.scheduler = native_scheduler
    expected = run(kind, pipeline, denoising_end=0.5)
    # One of the three steps, 667, is above the half. Euler's x is ours divided by alpha.
    alpha = (1 + float(native_scheduler.sigmas[1]) ** 2) ** -0.5
    torch.testing.assert_close(early, alpha * expected, atol=MAX_DIFFERENCE, rtol=0)


def test_a_pipeline_that_passes_no_generator_refuses_samplers_that_add_noise(natives: dict[str, Native]) -> None:
    for kind in (by_name("ldm-uncond"), by_name("flux")):
        before = native(kind, natives)
        with pytest.raises(ValueError, match="'ddpm' adds noise, and step was given no generator"):
            run(kind, tuned(replace(kind, sampler="ddpm"), before, None))


def by_name(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


@pytest.mark.timeout(900)
def test_a_fresh_process_loads_every_saved_kind(tmp_path: Path, natives: dict[str, Native]) -> None:
    expected = {}
    for kind in KINDS:
        before = native(kind, natives)
        pipeline = tuned(kind, before, [0.9, 0.8, 1.0][: kind.num_steps])
        pipeline.save_pretrained(tmp_path / kind.name)
        pipeline.scheduler = TimeTunerScheduler.from_pretrained(tmp_path / kind.name, subfolder="scheduler")
        expected[kind.name] = run(kind, pipeline)
        # The ratios reached the network.
        assert not torch.allclose(expected[kind.name], before.output, atol=MAX_DIFFERENCE, rtol=0), kind.name
    subprocess.run([sys.executable, "-m", "tests.core.pipelines.run", tmp_path], check=True)
    loaded = load_file(tmp_path / "outputs.safetensors")
    assert loaded.keys() == expected.keys()
    for name, output in expected.items():
        torch.testing.assert_close(loaded[name], output, msg=lambda message, name=name: f"{name}: {message}")
