"""A tuned schedule as a diffusers scheduler: the same samples, also after a round trip through disk."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor

from tests.core.conftest import tiny_unet
from timetuner_core import TimeTuner
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.models.loading import BUILTIN_FOLDERS, load_builtin
from timetuner_core.samplers import SAMPLERS, step_noise

RATIOS = [1.0, 0.98, 1.03, 0.95, 1.01]
GRID = [1.0, 0.81, 0.6, 0.37, 0.2, 0.001]
SCHEDULE: dict[str, Any] = {"timesteps": GRID, "t_ratios": RATIOS, "sampler": "ddim", "eta": 0.0, "id": "sch_1"}
SINGLE_CALL = [name for name, sampler in SAMPLERS.items() if sampler.calls_per_step == 1]


@pytest.fixture(scope="module")
def folder() -> Path:
    return BUILTIN_FOLDERS["digits8"]


def noise(count: int) -> Tensor:
    return torch.randn((count, 1, 8, 8), generator=torch.Generator().manual_seed(7))


def run(scheduler: TimeTunerScheduler, unet: Any, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """The loop of every diffusers pipeline."""
    scheduler.set_timesteps(len(RATIOS))
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = unet(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
        x = scheduler.step(output, t, x, **kwargs).prev_sample
    return x


@pytest.mark.parametrize("sampler", SINGLE_CALL)
def test_samples_are_bit_for_bit_those_of_the_library(folder: Path, sampler: str) -> None:
    x_T, labels = noise(4), torch.tensor([0, 3, 5, 9])
    schedule = {**SCHEDULE, "sampler": sampler}
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler.from_pretrained(folder, subfolder="scheduler"), schedule)
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    by_diffusers = run(scheduler, unet, x_T, labels, generator=generators)

    model = load_builtin("digits8")
    tuner = TimeTuner(model.model_fn("classifier-free", 1.0), model.noise_schedule)
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    by_library = tuner.sample(
        x_T, timesteps=GRID, t_ratios=RATIOS, condition=labels, sampler=sampler, generator=generators
    )
    assert torch.equal(by_diffusers, by_library)


def test_a_scheduler_can_be_run_again(folder: Path) -> None:
    base = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler = TimeTunerScheduler.from_schedule(base, {**SCHEDULE, "sampler": "unipc_3"})
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    first, second = (run(scheduler, unet, noise(2), torch.tensor([1, 2])) for _ in range(2))
    assert torch.equal(first, second)


def test_a_pipeline_keeps_its_schedule_on_disk(tmp_path: Path) -> None:
    pipeline = DDPMPipeline(tiny_unet(), DDPMScheduler())
    plain = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images
    pipeline.scheduler = TimeTunerScheduler.from_schedule(pipeline.scheduler, {**SCHEDULE, "sampler": "dpmpp_2m"})

    def images(pipeline: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(generator=generator, num_inference_steps=5, output_type="np").images

    before = images(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, TimeTunerScheduler)
    assert dict(loaded.scheduler.config)["t_ratios"] == RATIOS
    assert (images(loaded) == before).all()
    assert (before != plain).any()


def test_noise_is_added_as_at_the_step_whose_input_is_named() -> None:
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), SCHEDULE)
    x0, eps = torch.ones(2, 1, 2, 2), step_noise(torch.ones(2, 1, 2, 2), torch.Generator().manual_seed(0))
    x_t = scheduler.add_noise(x0, eps, scheduler.timesteps[[1, 3]])
    t = torch.tensor([GRID[1], GRID[3]])[:, None, None, None]
    alpha_t, sigma_t = scheduler.noise_schedule.marginal_alpha(t), scheduler.noise_schedule.marginal_std(t)
    torch.testing.assert_close(x_t, alpha_t * x0 + sigma_t * eps)


def test_a_scheduler_makes_way_for_another_of_the_same_pipeline() -> None:
    first = TimeTunerScheduler.from_schedule(DDPMScheduler(beta_end=0.03), SCHEDULE)
    second = TimeTunerScheduler.from_schedule(first, {**SCHEDULE, "t_ratios": [1.0] * 5})
    assert second.config["base_scheduler"] == first.config["base_scheduler"]
    again = TimeTunerScheduler({**second.config, "_class_name": "TimeTunerScheduler"}, GRID)
    assert torch.equal(again.timesteps, second.timesteps)


def test_noise_for_a_timestep_that_is_no_step_is_refused() -> None:
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), SCHEDULE)
    scheduler.set_begin_index(2)
    x0 = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="accepted: "):
        scheduler.add_noise(x0, x0, scheduler.timesteps[[0]])
    with pytest.raises(ValueError, match=r"timesteps is empty; a `strength` of 0.2 or more"):
        scheduler.add_noise(x0, x0, scheduler.timesteps[5:])


def test_a_pipeline_that_starts_in_the_middle_need_not_say_so() -> None:
    x, output = noise(2), 0.1 * noise(2)
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), SCHEDULE)
    found = scheduler.step(output, scheduler.timesteps[2], x).prev_sample
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    told = scheduler.step(output, scheduler.timesteps[2], x).prev_sample
    assert torch.equal(found, told)


def test_steps_go_in_order_and_end() -> None:
    x = noise(1)
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), SCHEDULE)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"timestep is 979\.02; accepted: 792\.8, that of step 1"):
        scheduler.step(x, 979.02, x)
    for t in scheduler.timesteps[1:]:
        scheduler.step(x, t.bfloat16(), x)  # rounded, as a pipeline in half precision passes it
    with pytest.raises(ValueError, match="all 5 steps are done"):
        scheduler.step(x, scheduler.timesteps[4], x)
    with pytest.raises(ValueError, match="timestep is 500; accepted: "):
        TimeTunerScheduler.from_schedule(DDPMScheduler(), SCHEDULE).step(x, 500, x)


@pytest.mark.parametrize("begin_index", [-1, 5])
def test_a_start_that_leaves_no_step_is_refused(begin_index: int) -> None:
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), SCHEDULE)
    with pytest.raises(ValueError, match=r"accepted: 0 to 4; an image-to-image `strength` of 0.2 or more"):
        scheduler.set_begin_index(begin_index)


def test_an_eta_that_would_be_ignored_is_refused() -> None:
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), {**SCHEDULE, "eta": 0.3})
    x, t = noise(1), scheduler.timesteps[0]
    for eta in (0.5, 1.0):
        with pytest.raises(ValueError, match=rf"eta is {eta}; accepted: 0\.3"):
            scheduler.step(x, t, x, generator=torch.Generator(), eta=eta)
    with pytest.raises(ValueError, match="use_clipped_model_output is True; accepted: False"):
        scheduler.step(x, t, x, generator=torch.Generator(), use_clipped_model_output=True)
    results = []
    for eta in (None, 0.0, 0.3):
        scheduler.set_timesteps(5)
        results.append(scheduler.step(x, t, x, generator=torch.Generator().manual_seed(0), eta=eta).prev_sample)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_noise_that_no_seed_reproduces_is_refused() -> None:
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), {**SCHEDULE, "sampler": "ddpm"})
    x, t = noise(1), scheduler.timesteps[0]
    with pytest.raises(ValueError, match="'ddpm' adds noise, and step was given no generator"):
        scheduler.step(x, t, x)
    torch.manual_seed(0)
    by_global = scheduler.step(x, t, x, generator=None).prev_sample
    scheduler.set_timesteps(5)
    by_own = scheduler.step(x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert torch.equal(by_global, by_own)


def test_a_predicted_variance_is_left_out() -> None:
    base = DDPMScheduler(variance_type="learned_range")
    scheduler = TimeTunerScheduler.from_schedule(base, SCHEDULE)
    assert scheduler.config.variance_type == "learned_range"  # pipelines pass the variance on if it says so
    x, output = noise(1), 0.1 * noise(1)
    with_variance = scheduler.step(torch.cat([output, x], dim=1), scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.step(output, scheduler.timesteps[0], x).prev_sample, with_variance)


def test_a_grid_below_the_largest_noise_starts_from_less_noise() -> None:
    """Data of standard deviation 0.5, whose exact EDM network is 0 everywhere, from sigma 5 instead of 80."""
    timesteps = torch.linspace(5**0.25, 0, 41).double() ** 4
    schedule = {"timesteps": timesteps.tolist(), "sampler": "dpmpp_2m"}
    scheduler = TimeTunerScheduler.from_schedule(EDMEulerScheduler(), schedule)
    assert scheduler.init_noise_sigma == pytest.approx(5.0)
    x = scheduler.init_noise_sigma * noise(400)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    assert float(x.std()) == pytest.approx(0.5, rel=0.02)


def test_a_flow_models_grid_that_starts_below_the_noise_of_its_pipelines_is_refused() -> None:
    base = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"starts at noise level 0\.8; accepted: 0\.99 to 1"):
        TimeTunerScheduler.from_schedule(base, {"timesteps": [0.8, 0.4, 0.0]})
    # shift 5 brings a start at t = 0.97 to noise level 0.994
    TimeTunerScheduler.from_schedule(FlowMatchEulerDiscreteScheduler(shift=5.0), {"timesteps": [0.97, 0.4, 0.0]})


def test_steps_that_a_user_places_are_refused() -> None:
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), SCHEDULE)
    own = scheduler.timesteps.tolist()
    for field, value in (("timesteps", [999, 799, 599, 399, 199]), ("sigmas", [10.0, 5.0, 2.0, 1.0, 0.5])):
        with pytest.raises(ValueError, match=f"{field} is .*; accepted: none, or the schedule's own"):
            scheduler.set_timesteps(**{field: value})
        with pytest.raises(ValueError, match=f"{field} is 2; accepted: 5"):
            scheduler.set_timesteps(**{field: value[:2]})
    scheduler.set_timesteps(timesteps=[round(t) for t in own])
    scheduler.set_timesteps(sigmas=scheduler.sigmas[:-1].tolist())
    assert scheduler.timesteps.tolist() == own


def test_flow_pipelines_place_no_steps() -> None:
    """They pass `sigmas` and `mu`, which are those of an untuned schedule."""
    base = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler = TimeTunerScheduler.from_schedule(base, {**SCHEDULE, "t_ratios": [1.0] * 5})
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2], mu=0.7)
    torch.testing.assert_close(scheduler.timesteps, 1000 * torch.tensor(GRID[:-1]))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(GRID))


def test_a_pipeline_that_names_times_and_noise_levels_tells_the_time_before_the_shift() -> None:
    """CogView4 tells its network 999 * s where the noise level is s shifted by mu."""
    native = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    steps = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    native.set_timesteps(sigmas=steps.tolist(), timesteps=(1000 * steps).tolist(), mu=0.6)
    scheduler = TimeTunerScheduler.from_schedule(native, {"timesteps": native.sigmas.tolist()})
    scheduler.set_timesteps(sigmas=steps.tolist(), timesteps=(1000 * steps).tolist(), mu=0.6)
    torch.testing.assert_close(scheduler.timesteps, native.timesteps)
    torch.testing.assert_close(scheduler.sigmas, native.sigmas)


def test_a_loader_beside_the_configuration_stands_for_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline = DDPMPipeline(tiny_unet(), DDPMScheduler())
    pipeline.scheduler = TimeTunerScheduler.from_schedule(pipeline.scheduler, SCHEDULE)
    pipeline.save_pretrained(tmp_path)
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler", with_loader=True)
    # A process that did not import the module has no such entry.
    monkeypatch.delitem(sys.modules, "timetuner_core.integrations.diffusers")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.scheduler.config == TimeTunerScheduler.from_pretrained(tmp_path, subfolder="scheduler").config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "magic"}, "accepted: ddim"),
        ({"t_ratios": [1.0]}, "one per step"),
        ({"timesteps": [0.1, 0.5]}, "fall strictly"),
    ],
)
def test_a_schedule_that_no_pipeline_can_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeTunerScheduler.from_schedule(DDPMScheduler(), {**SCHEDULE, **change})


def test_another_number_of_steps_is_refused() -> None:
    scheduler = TimeTunerScheduler.from_schedule(DDPMScheduler(), SCHEDULE)
    with pytest.raises(ValueError, match="num_inference_steps is 10; accepted: 5"):
        scheduler.set_timesteps(10)
