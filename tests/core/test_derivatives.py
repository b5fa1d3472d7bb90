"""d x_s / d t_ratio by autograd, by forward mode and by finite differences, for every sampler, guidance and network."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.core.conftest import crossed, normals, small_mixture, tiny_unet
from timetuner_core import NoiseScheduleVP, model_wrapper
from timetuner_core.guided_model import GuidedModel
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow
from timetuner_core.samplers import SAMPLERS, Past, Sampler, remember

LINEAR = NoiseScheduleVP("linear")
LABELS, NULL = torch.tensor([0, 1, 1]), torch.tensor([2])
T_RATIO = torch.tensor(0.97, dtype=torch.float64)

GUIDANCE: dict[str, dict[str, Any]] = {
    "uncond": {},
    "classifier": {"guidance_type": "classifier", "guidance_scale": 1.5},
    "classifier, outside its interval": {
        "guidance_type": "classifier",
        "guidance_scale": 1.5,
        "guidance_interval": (0.0, 0.1),
    },
    "classifier-free": {"guidance_type": "classifier-free", "guidance_scale": 2.5},
    "classifier-free, inside its interval": {
        "guidance_type": "classifier-free",
        "guidance_scale": 2.5,
        "guidance_interval": (0.2, 0.8),
    },
    "classifier-free, rescaled": {
        "guidance_type": "classifier-free",
        "guidance_scale": 2.5,
        "guidance_rescale": 0.7,
    },
}
SCHEDULES: dict[str, NoiseSchedule] = {
    "discrete": NoiseScheduleVP("discrete", betas=torch.linspace(1e-3, 0.2, 50, dtype=torch.float64)),
    "linear": LINEAR,
    "cosine": NoiseScheduleVP("cosine"),
    "flow": NoiseScheduleFlow(shift=3.0),
    "edm": NoiseScheduleEDM(),
}
UNETS: dict[str, dict[str, Any]] = {"unconditional": {}, "class-conditional": {"num_class_embeds": 3}}
LAMBDAS = [-1.0, -0.8, -0.5, -0.1, 0.4]

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def mixture_model(schedule: NoiseSchedule, **guidance: Any) -> GuidedModel:
    mixture = small_mixture(schedule)
    if guidance.get("guidance_type") == "classifier":
        guidance["classifier_fn"] = mixture.log_class_posterior
    return model_wrapper(mixture, schedule, **guidance)


def unet_model(**config: Any) -> GuidedModel:
    unet = tiny_unet(**config).double()
    if "num_class_embeds" not in config:
        return model_wrapper(lambda x, t_input: unet(x, t_input).sample, LINEAR)
    guidance: dict[str, Any] = GUIDANCE["classifier-free"]
    return model_wrapper(lambda x, t_input, labels: unet(x, t_input, labels).sample, LINEAR, **guidance)


def step_in_ratio(sampler: Sampler, model: GuidedModel, x: Tensor) -> Callable[[Tensor], Tensor]:
    """x_s as a function of the ratio, for the last step of the grid, after as much history as the sampler wants."""
    step_fn = sampler.step_fn(model, model.noise_schedule)
    grid = model.noise_schedule.inverse_lambda(torch.tensor(LAMBDAS, dtype=torch.float64))
    conditions = {} if model.guidance_type == "uncond" else {"condition": LABELS}
    if model.guidance_type == "classifier-free":
        conditions["uncond_condition"] = NULL
    arguments: dict[str, Any] = {"noise": normals(*x.shape, seed=9), **conditions}
    if sampler.takes_eta:
        arguments["eta"] = 0.5
    history: tuple[Past, ...] = ()
    for t, s in itertools.pairwise(grid[:-1]):
        x_s, x0 = step_fn(x, t, s, history=history, **arguments)
        history, x = remember(step_fn, history, Past(t, x, x0)), x_s
    return lambda t_ratio: step_fn(x, grid[-2], grid[-1], t_ratio, history=history, **arguments)[0]


def assert_derivatives_agree(x_s: Callable[[Tensor], Tensor], delta: float = 1e-5) -> None:
    """They agree to 1e-4 of the derivative's size; the finite differences, of step `delta`, are of fourth order."""
    autograd = torch.autograd.functional.jacobian(x_s, T_RATIO)
    value, forward = torch.func.jvp(x_s, (T_RATIO,), (torch.ones_like(T_RATIO),))
    near, far = (x_s(T_RATIO + k * delta) - x_s(T_RATIO - k * delta) for k in (1, 2))
    finite = (8 * near - far) / (12 * delta)
    size = float(finite.norm())
    assert size > 1e-3  # or there would be nothing to tune
    assert float((forward - autograd).norm()) < 1e-6 * size
    assert float((forward - finite).norm()) < 1e-4 * size
    with torch.no_grad():
        torch.testing.assert_close(x_s(T_RATIO), value, atol=1e-10, rtol=0)


@crossed(sampler=SAMPLERS, guidance=GUIDANCE)
def test_derivatives_agree_for_every_sampler_and_guidance(sampler: Sampler, guidance: dict[str, Any]) -> None:
    model = mixture_model(LINEAR, **guidance)
    assert_derivatives_agree(step_in_ratio(sampler, model, normals(3, 2)))


@crossed(sampler=SAMPLERS, kind=list(SCHEDULES))
def test_derivatives_agree_for_every_sampler_and_schedule(sampler: Sampler, kind: str) -> None:
    model = mixture_model(SCHEDULES[kind])
    assert_derivatives_agree(step_in_ratio(sampler, model, normals(3, 2)))


@crossed(sampler=SAMPLERS, config=UNETS)
def test_derivatives_agree_through_a_diffusers_network(sampler: Sampler, config: dict[str, Any]) -> None:
    x_s = step_in_ratio(sampler, unet_model(**config), normals(3, 1, 4, 4))
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no forward mode
        assert_derivatives_agree(x_s, delta=5e-3)  # diffusers embeds the time in float32


@every_sampler
def test_each_sample_may_have_its_own_ratio(sampler: Sampler) -> None:
    """Parallel tuning needs this: a batch of ratios gives the derivatives of one for all."""
    x_s = step_in_ratio(sampler, mixture_model(LINEAR), normals(3, 2))
    batched, single = (torch.func.jvp(x_s, (r,), (torch.ones_like(r),)) for r in (T_RATIO.repeat(3), T_RATIO))
    torch.testing.assert_close(batched, single, atol=1e-12, rtol=0)
