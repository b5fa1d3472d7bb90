"""The six examples of the original code's README, as they stand there."""
# ruff: noqa: C408

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from time_tuner import NoiseScheduleVP, TimeTuner, model_wrapper
from torch import Tensor

from tests.core.conftest import Network, Recorded, crossed, linear_betas, normals, small_mixture, tiny_unet


@dataclass(frozen=True)
class Setting:
    """The names that the examples leave to the reader: `model(x, t, labels=None, gain=1)`, its classifier and data."""

    model: Recorded
    classifier: Network
    images: Tensor
    labels: Tensor


betas = linear_betas(1000).float()
model_kwargs = {"gain": 1.0}
classifier_kwargs = {"gain": 1.0}
guidance_scale = 2.0
t_ratios = torch.linspace(1.0, 0.9, 10)
lr, total_iters = 0.01, 3
condition, uncond_condition = torch.tensor([0, 1, 1, 0]), torch.full((4,), 2)


def mixture_setting() -> Setting:
    mixture = small_mixture(NoiseScheduleVP(schedule="discrete", betas=betas))

    def model(x: Tensor, t: Tensor, labels: Tensor | None = None, gain: float = 1.0) -> Tensor:
        return gain * mixture(x, t, labels)

    def classifier(x: Tensor, t: Tensor, labels: Tensor, gain: float = 1.0) -> Tensor:
        return gain * mixture.log_class_posterior(x, t, labels)

    images, labels = mixture.sample(10, torch.Generator().manual_seed(0))
    return Setting(Recorded(model), classifier, images.float(), labels)


def unet_setting() -> Setting:
    unet, directions = tiny_unet(num_class_embeds=3), normals(16, 2).float()

    def model(x: Tensor, t: Tensor, labels: Tensor | None = None, gain: float = 1.0) -> Tensor:
        labels = torch.full((len(x),), 2) if labels is None else labels
        eps: Tensor = gain * unet(x, t, class_labels=labels).sample
        return eps

    def classifier(x: Tensor, t: Tensor, labels: Tensor, gain: float = 1.0) -> Tensor:
        logits = gain * x.flatten(1) @ directions
        return logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]

    images = normals(10, 1, 4, 4).float().clamp(-1, 1)
    return Setting(Recorded(model), classifier, images, torch.arange(10) % 2)


SETTINGS = {"mixture": mixture_setting, "unet": unet_setting}
sampled = crossed(make_setting=SETTINGS, eta=[0.0, 1.0])
tuned = crossed(make_setting=SETTINGS, eta=[0.0, 1.0], tune_type=["sequential", "parallel"])


@pytest.fixture
def setting(make_setting: Callable[[], Setting]) -> Setting:
    return make_setting()


@pytest.fixture(name="x_T")
def initial_noise(setting: Setting) -> Tensor:
    return normals(4, *setting.images.shape[1:]).float()


def make_data_loader(setting: Setting, conditional: bool) -> Any:
    images, labels = setting.images, setting.labels

    class Dataset(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            data_dict = dict()
            # Prepare the image.
            data_dict.update(image=images[index])
            # Prepare the label (optional).
            if conditional:
                data_dict.update(label=labels[index])
            return data_dict

    return torch.utils.data.DataLoader(Dataset(), batch_size=4)


def assert_ten_network_steps(x: Tensor, x_T: Tensor, model: Recorded) -> None:
    assert x.shape == x_T.shape
    assert bool(x.isfinite().all())
    assert not torch.equal(x, x_T)
    assert len(model.calls) == 10
    conditioning = torch.linspace(1.0, 1e-3, 11)[:-1] * t_ratios
    torch.testing.assert_close(torch.tensor(model.times), conditioning * 1000 - 1, atol=1e-3, rtol=1e-5)


def assert_tuned(t_ratios: Tensor) -> None:
    timesteps = torch.linspace(1.0, 1e-3, 11, dtype=torch.float64)[:-1]
    assert t_ratios.shape == (10,)
    assert t_ratios[-1] == 1.0
    assert bool((t_ratios[1:-1] != 1.0).all())
    assert float((timesteps * t_ratios).min()) >= 1e-3 - 1e-9
    assert float((timesteps * t_ratios).max()) <= 1.0 + 1e-9


@sampled
def test_unconditional_sampling(setting: Setting, x_T: Tensor, eta: float) -> None:
    model = setting.model

    # 1. Define the noise schedule.
    noise_schedule = NoiseScheduleVP(schedule="discrete", betas=betas)

    ## 2. Convert your discrete-time `model` to the continuous-time
    ## noise prediction model. Here is an example for a diffusion model
    ## `model` with the noise prediction type.
    model_fn = model_wrapper(
        model,
        noise_schedule,
        model_type="noise",
        model_kwargs=model_kwargs,
        guidance_type="uncond",
    )

    # 3. Define TimeTuner for sampling.
    time_tuner = TimeTuner(model_fn, noise_schedule)

    # 4. Use corresponding pre-tuned `t_ratios` for sampling with NFE = 10.
    x = time_tuner.ddim_sample(x=x_T, num_steps=10, t_ratios=t_ratios, eta=eta)

    assert_ten_network_steps(x, x_T, model)


@sampled
def test_classifier_guidance_sampling(setting: Setting, x_T: Tensor, eta: float) -> None:
    model, classifier = setting.model, setting.classifier

    # 1. Define the noise schedule.
    noise_schedule = NoiseScheduleVP(schedule="discrete", betas=betas)

    # 2. Convert your discrete-time `model` to the continuous-time
    # noise prediction model. Here is an example for a diffusion model
    # `model` with the noise prediction type.
    model_fn = model_wrapper(
        model,
        noise_schedule,
        model_type="noise",
        guidance_type="classifier",
        guidance_scale=guidance_scale,
        classifier_fn=classifier,
        model_kwargs=model_kwargs,
        classifier_kwargs=classifier_kwargs,
    )

    # 3. Define TimeTuner for sampling.
    time_tuner = TimeTuner(model_fn, noise_schedule)

    # 4. Use corresponding pre-tuned `t_ratios` for sampling with NFE = 10.
    x = time_tuner.ddim_sample(x=x_T, num_steps=10, t_ratios=t_ratios, eta=eta, condition=condition)

    assert_ten_network_steps(x, x_T, model)


@sampled
def test_classifier_free_guidance_sampling(setting: Setting, x_T: Tensor, eta: float) -> None:
    model = setting.model

    # 1. Define the noise schedule.
    noise_schedule = NoiseScheduleVP(schedule="discrete", betas=betas)

    # 2. Convert your discrete-time `model` to the continuous-time
    # noise prediction model. Here is an example for a diffusion model
    # `model` with the noise prediction type.
    model_fn = model_wrapper(
        model,
        noise_schedule,
        model_type="noise",
        guidance_type="classifier-free",
        guidance_scale=guidance_scale,
        model_kwargs=model_kwargs,
    )

    # 3. Define TimeTuner for sampling.
    time_tuner = TimeTuner(model_fn, noise_schedule)

    # 4. Use corresponding pre-tuned `t_ratios` for sampling with NFE = 10.
    x = time_tuner.ddim_sample(
        x=x_T, num_steps=10, t_ratios=t_ratios, eta=eta, condition=condition, uncond_condition=uncond_condition
    )

    assert_ten_network_steps(x, x_T, model)


@tuned
def test_unconditional_training(setting: Setting, eta: float, tune_type: Any) -> None:
    model, data_loader = setting.model, make_data_loader(setting, conditional=False)

    # 1. Define the noise schedule.
    noise_schedule = NoiseScheduleVP(schedule="discrete", betas=betas)

    ## 2. Convert your discrete-time `model` to the continuous-time
    ## noise prediction model. Here is an example for a diffusion model
    ## `model` with the noise prediction type.
    model_fn = model_wrapper(
        model,
        noise_schedule,
        model_type="noise",
        model_kwargs=model_kwargs,
        guidance_type="uncond",
    )

    # 3. Define TimeTuner for optimizing, together with the DDIM sampler.
    time_tuner = TimeTuner(model_fn, noise_schedule)
    step_fn = time_tuner.ddim_step_fn
    step_fn_kwargs: dict[str, Any] = dict(eta=eta)

    # 4. Optimize the preset timesteps with NFE = 10.
    t_ratios = time_tuner.optimize_timesteps(
        data_loader=data_loader,
        step_fn=step_fn,
        num_steps=10,
        tune_type=tune_type,
        lr=lr,
        total_iters=total_iters,
        verbose=True,
        **step_fn_kwargs,
    )

    assert_tuned(t_ratios)


@tuned
def test_classifier_guidance_training(setting: Setting, eta: float, tune_type: Any) -> None:
    model, classifier, data_loader = setting.model, setting.classifier, make_data_loader(setting, conditional=True)

    # 1. Define the noise schedule.
    noise_schedule = NoiseScheduleVP(schedule="discrete", betas=betas)

    ## 2. Convert your discrete-time `model` to the continuous-time
    ## noise prediction model. Here is an example for a diffusion model
    ## `model` with the noise prediction type.
    model_fn = model_wrapper(
        model,
        noise_schedule,
        model_type="noise",
        guidance_type="classifier",
        guidance_scale=guidance_scale,
        classifier_fn=classifier,
        model_kwargs=model_kwargs,
        classifier_kwargs=classifier_kwargs,
    )

    # 3. Define TimeTuner for optimizing, together with the DDIM sampler.
    time_tuner = TimeTuner(model_fn, noise_schedule)
    step_fn = time_tuner.ddim_step_fn
    step_fn_kwargs: dict[str, Any] = dict(eta=eta)

    # 4. Optimize the preset timesteps with NFE = 10.
    t_ratios = time_tuner.optimize_timesteps(
        data_loader=data_loader,
        step_fn=step_fn,
        num_steps=10,
        tune_type=tune_type,
        lr=lr,
        total_iters=total_iters,
        verbose=True,
        **step_fn_kwargs,
    )

    assert_tuned(t_ratios)


@tuned
def test_classifier_free_guidance_training(setting: Setting, eta: float, tune_type: Any) -> None:
    model, data_loader = setting.model, make_data_loader(setting, conditional=True)

    # 1. Define the noise schedule.
    noise_schedule = NoiseScheduleVP(schedule="discrete", betas=betas)

    ## 2. Convert your discrete-time `model` to the continuous-time
    ## noise prediction model. Here is an example for a diffusion model
    ## `model` with the noise prediction type.
    model_fn = model_wrapper(
        model,
        noise_schedule,
        model_type="noise",
        guidance_type="classifier-free",
        guidance_scale=guidance_scale,
        model_kwargs=model_kwargs,
    )

    # 3. Define TimeTuner for optimizing, together with the DDIM sampler.
    time_tuner = TimeTuner(model_fn, noise_schedule)
    step_fn = time_tuner.ddim_step_fn
    step_fn_kwargs: dict[str, Any] = dict(eta=eta, uncond_condition=uncond_condition)

    # 4. Optimize the preset timesteps with NFE = 10.
    t_ratios = time_tuner.optimize_timesteps(
        data_loader=data_loader,
        step_fn=step_fn,
        num_steps=10,
        tune_type=tune_type,
        lr=lr,
        total_iters=total_iters,
        verbose=True,
        **step_fn_kwargs,
    )

    assert_tuned(t_ratios)
