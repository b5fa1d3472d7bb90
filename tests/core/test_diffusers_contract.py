"""The checks that diffusers makes of every scheduler, on each kind of noise schedule, for `TimeTunerScheduler`."""

import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from timetuner_core.integrations.diffusers import TimeTunerScheduler

NUM_STEPS = 4
BASES = {
    "DDPM": diffusers.DDPMScheduler(beta_end=0.015),
    "DDIM": diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False),
    "Euler": diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "EDM": diffusers.EDMEulerScheduler(sigma_max=40.0),
}


def make(name: str, sampler: str = "ddpm") -> TimeTunerScheduler:
    timesteps = [40.0, 10.0, 2.0, 0.5, 0.01] if name == "EDM" else [1.0, 0.7, 0.4, 0.2, 0.0]
    schedule = {"timesteps": timesteps, "t_ratios": [1.0, 0.97, 1.02, 0.9], "sampler": sampler, "eta": 0.0}
    return TimeTunerScheduler.from_schedule(BASES[name], schedule)


@pytest.fixture(params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture
def scheduler(name: str) -> TimeTunerScheduler:
    return make(name)


def sample(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + t / 1000)


def loop(scheduler: TimeTunerScheduler, x: Tensor) -> Tensor:
    """Every step, by the sampler that adds noise."""
    generator = torch.Generator().manual_seed(2)
    scheduler.set_timesteps(NUM_STEPS)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


def test_a_saved_scheduler_takes_the_same_steps(scheduler: TimeTunerScheduler, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    loaded = TimeTunerScheduler.from_pretrained(tmp_path)
    assert torch.equal(loop(scheduler, sample()), loop(loaded, sample()))


def test_a_saved_configuration_is_the_same(scheduler: TimeTunerScheduler, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    loaded = TimeTunerScheduler.from_pretrained(tmp_path)
    without_marks = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == without_marks


def test_the_bases_fields_are_at_the_top_level(name: str, scheduler: TimeTunerScheduler) -> None:
    fields = {key: value for key, value in BASES[name].config.items() if not key.startswith("_")}
    assert {key: scheduler.config[key] for key in fields} == fields


def test_compatible_classes_take_the_configuration_and_give_it_back(name: str, scheduler: TimeTunerScheduler) -> None:
    assert type(BASES[name]) in scheduler.compatibles
    # Some of the others take a second to build.
    quick = {type(BASES[name]), diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler}
    for each in quick.intersection(scheduler.compatibles):
        other = each.from_config(scheduler.config)
        back = TimeTunerScheduler.from_config(other.config)
        assert torch.equal(loop(back, sample()), loop(scheduler, sample())), each


def test_going_back_to_a_class_of_diffusers_keeps_the_betas() -> None:
    base = diffusers.HeunDiscreteScheduler()  # This class has other default betas than the rest.
    scheduler = TimeTunerScheduler.from_schedule(base, {"timesteps": [1.0, 0.0]})
    for class_ in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler):
        assert torch.equal(class_.from_config(scheduler.config).betas, base.betas)
    alphas_cumprod = scheduler.noise_schedule.marginal_alpha(torch.arange(1, 1001).double() / 1000) ** 2
    torch.testing.assert_close(alphas_cumprod, base.alphas_cumprod.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_keeps_shape_and_dtype(scheduler: TimeTunerScheduler, dtype: torch.dtype) -> None:
    x = sample(dtype)
    output = scheduler.step(0.1 * x, scheduler.timesteps[0], x, generator=torch.Generator())
    for each in (output.prev_sample, output.pred_original_sample):
        assert each.shape == x.shape
        assert each.dtype == dtype


def test_half_precision_computes_in_single() -> None:
    """x0 is a small difference divided by alpha, 0.06 here: half precision would be off by a hundredth."""
    base = diffusers.DDIMScheduler(clip_sample=False)
    scheduler = TimeTunerScheduler.from_schedule(base, {"timesteps": [0.75, 0.4, 0.0]})
    x = sample().half()
    output = 0.99 * x
    half = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample
    scheduler.set_timesteps(2)
    single = scheduler.step(output.float(), scheduler.timesteps[0], x.float()).pred_original_sample
    torch.testing.assert_close(half.float(), single, rtol=1e-3, atol=1e-4)


def test_tuple_and_dictionary_hold_the_same(scheduler: TimeTunerScheduler) -> None:
    x, t = sample(), scheduler.timesteps[0]
    outputs = scheduler.step(0.1 * x, t, x, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(NUM_STEPS)
    pair = scheduler.step(0.1 * x, t, x, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip(outputs.values(), pair, strict=True))


def test_inputs_are_scaled_as_edm_does_only_for_edm(name: str, scheduler: TimeTunerScheduler) -> None:
    x = sample()
    scaled = scheduler.scale_model_input(x, scheduler.timesteps[0])
    expected = x / (40.0**2 + 0.5**2) ** 0.5 if name == "EDM" else x
    torch.testing.assert_close(scaled, expected)


def test_noise_is_added_at_any_step(scheduler: TimeTunerScheduler) -> None:
    x0, noise = sample(), torch.randn(2, 3, 4, 4)
    noised = scheduler.add_noise(x0, noise, scheduler.timesteps[[1, 3]])
    assert noised.shape == x0.shape
    sigma, alpha = scheduler.sigmas[[1, 3]].reshape(2, 1, 1, 1), scheduler.noise_schedule.marginal_alpha
    times = torch.tensor(scheduler.config.timesteps).double()[[1, 3]]
    alpha_t = alpha(times).float().reshape(2, 1, 1, 1)
    sigma_t = sigma if "shift" in scheduler.config else sigma * alpha_t
    torch.testing.assert_close(noised, alpha_t * x0 + sigma_t * noise)
    assert torch.equal(scheduler.scale_noise(x0, scheduler.timesteps[[1, 3]], noise), noised)


def test_the_constructor_takes_no_unknown_arguments() -> None:
    kinds = {parameter.kind for parameter in inspect.signature(TimeTunerScheduler.__init__).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_betas_given_one_by_one_are_saved(tmp_path: Path) -> None:
    base = diffusers.DDPMScheduler(trained_betas=np.array([0.1, 0.3]), num_train_timesteps=2)
    TimeTunerScheduler.from_schedule(base, {"timesteps": [1.0, 0.5, 0.0]}).save_pretrained(tmp_path)
    loaded = TimeTunerScheduler.from_pretrained(tmp_path)
    alphas = loaded.noise_schedule.marginal_alpha(torch.tensor([0.5, 1.0]).double())
    torch.testing.assert_close(alphas**2, torch.tensor([0.9, 0.63]).double())


def test_attributes_are_found_without_warnings(scheduler: TimeTunerScheduler, recwarn: pytest.WarningsRecorder) -> None:
    for attribute in ("timesteps", "sigmas", "init_noise_sigma", "order", "num_inference_steps", "save_pretrained"):
        assert hasattr(scheduler, attribute)
    assert not recwarn.list
    with pytest.raises(AttributeError, match="'TimeTunerScheduler' object has no attribute 'no_such'"):
        _ = scheduler.no_such
