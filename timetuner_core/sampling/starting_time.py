"""The time at which sampling starts: the latest one where the network's error does not swamp the data.

A network that predicts eps tells x0 as `(x_t - sigma_t eps) / alpha_t`. Near `T` alpha_t is small, and the least error
of eps becomes a large error of x0. Other predictions are not divided by alpha_t, and sampling starts at `T`.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from timetuner_core.grids import teacher_timesteps
from timetuner_core.models.diffusion_model import DiffusionModel
from timetuner_core.sampling.generate import Guidance, generate

# The root mean square error of x0 may be this many standard deviations of the data. A network that knows nothing but
# the data's mean has 1. Of the limits 1.05 to 3, tried on networks with a known error of eps, this one and those below
# gave samples as near to the data as diffusers' own grids or nearer; below 1.1, sampling starts where data are visible.
MAX_X0_ERROR = 1.2

MAX_SAMPLES = 64
MIN_SAMPLES = 4
MAX_VALUES = 2**18  # Large samples have values enough for fewer of them to do.
TEACHER_STEPS = 50
LAMBDA_STEP = 0.125  # Neighbouring candidates differ by a factor of 1.13 in sigma_t / alpha_t.
HIGHEST_LAMBDA = 0.0  # The search ends where x_t is half data.
DIVIDED_BY_ALPHA = ("noise", "score")


class StartingTime(NamedTuple):
    """The time at which grids start, and how wrong x0 is there.

    Attributes:
        t: In `(0, T]`.
        x0_error: The root mean square error of x0 at `t`, in standard deviations of the data; None if not measured.
    """

    t: float
    x0_error: float | None


def find_starting_time(
    model: DiffusionModel, *, num_samples: int | None = None, device: torch.device | str = "cpu"
) -> StartingTime:
    """The latest time from which `model` can be sampled, unguided, by calls of its network.

    The error of x0 is measured on the model's data. Without data, the noise that sampling starts from is enough to see
    that a start at `T` is good: x0 must then have the size of data in -1..1. If it has not, a teacher makes data from
    the latest start at which it has. A model that needs conditions, and came without any, is not measured and starts
    at `T`.

    Args:
        num_samples: As many samples are one network batch; by default 4 to 64, fewer if they are large. Most models
            need one call.
        device: The network's.
    """
    schedule = model.noise_schedule
    guidance = _guidance(model)
    if model.model_type not in DIVIDED_BY_ALPHA or guidance is None:
        return StartingTime(schedule.T, None)
    if num_samples is None:
        num_samples = min(max(MAX_VALUES // math.prod(model.sample_shape), MIN_SAMPLES), MAX_SAMPLES)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((num_samples, *model.sample_shape), generator=generator)
    has_conditions = guidance.type != "uncond"
    if model.draw_data is not None:
        x0, drawn = model.draw_data(num_samples, generator)
        condition = drawn if has_conditions else None
    else:
        draw = model.draw_conditions if has_conditions else None
        condition = None if draw is None else draw(num_samples, generator)
        by_noise = _latest(_Probe(model, guidance, condition, noise, None, device))
        if by_noise.t == schedule.T:
            return by_noise
        x0 = _teach(model.starting_at(by_noise.t), guidance, condition, num_samples, device)
    return _latest(_Probe(model, guidance, condition, noise, x0.cpu(), device))


@dataclasses.dataclass(frozen=True)
class _Probe:
    """The error of x0 at a time: `(B, *sample_shape)` of noise, and of data x0 or None for none."""

    model: DiffusionModel
    guidance: Guidance
    condition: Tensor | None
    noise: Tensor
    x0: Tensor | None
    device: torch.device | str

    def error_at(self, t: Tensor) -> float:
        schedule = self.model.noise_schedule
        alpha_t, sigma_t = float(schedule.marginal_alpha(t)), float(schedule.marginal_std(t))
        x0 = torch.zeros_like(self.noise) if self.x0 is None else self.x0
        x_t = (alpha_t * x0 + sigma_t * self.noise).to(self.device)
        condition = None if self.condition is None else self.condition.to(self.device)
        with torch.no_grad():
            predicted = self.guidance.model_fn(self.model).predict(x_t, t, 1.0, condition).x0.cpu()
        squared_error = (predicted - x0).double().square().mean()
        variance = 1.0 if self.x0 is None else x0.double().var(dim=0).mean()
        return float((squared_error / variance).sqrt())


def _latest(probe: _Probe) -> StartingTime:
    """The latest candidate whose error is small enough, else the one of least error."""
    measured: dict[float, float] = {}
    for t in _candidates(probe.model):
        measured[float(t)] = error = probe.error_at(t)
        if error <= MAX_X0_ERROR:
            return StartingTime(float(t), error)
    best = min(measured, key=lambda t: measured[t] if math.isfinite(measured[t]) else math.inf)
    return StartingTime(best, measured[best])


def _candidates(model: DiffusionModel) -> list[Tensor]:
    """Falling times from `T`, even in lambda; training steps, if the network was trained on N of them."""
    schedule = model.noise_schedule
    T = torch.tensor(schedule.T, dtype=torch.float64)
    lowest = float(schedule.marginal_lambda(T))
    lambdas = torch.arange(lowest, max(HIGHEST_LAMBDA, lowest) + LAMBDA_STEP, LAMBDA_STEP, dtype=torch.float64)[1:]
    times = schedule.inverse_lambda(lambdas)
    if schedule.max_num_steps is not None:
        times = (times * schedule.max_num_steps).floor().clamp(min=1) / schedule.max_num_steps
    return [T, *(t for t in times.unique().flip(0) if schedule.t_min < t < T)]  # type: ignore[no-untyped-call]


def _guidance(model: DiffusionModel) -> Guidance | None:
    """How the network is called without guidance; None if it cannot be."""
    if "uncond" in model.guidance_types:
        return Guidance("uncond", 1.0)
    return None if model.draw_conditions is None else Guidance("classifier-free", 1.0)


def _teach(
    model: DiffusionModel, guidance: Guidance, condition: Tensor | None, num_samples: int, device: torch.device | str
) -> Tensor:
    timesteps = teacher_timesteps(model.noise_schedule, TEACHER_STEPS)
    seeds = list(range(num_samples))
    return generate(model, guidance, seeds, condition, timesteps, decode=False, batch_size=num_samples, device=device)
