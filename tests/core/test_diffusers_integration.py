"""A tuned schedule as a diffusers scheduler: the same samples, also after a round trip through disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "heun"}, "one call per step: ddim"),
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
