"""Samplers that need no memory: DDIM and DDPM, Euler and Heun, singlestep DPM-Solver and DPM-Solver++."""

import torch
from torch import Tensor

from timetuner_core.guided_model import Prediction
from timetuner_core.samplers.base import Level, Sampler, Step, scaled


def ddim(step: Step) -> tuple[Tensor, Tensor]:
    """Song et al. 2021, eq. 12; eta 0 is deterministic, 1 ancestral."""
    prediction = step.predict(step.x, step.t)
    return _add_noise(step, prediction, step.eta), prediction.x0


def ddpm(step: Step) -> tuple[Tensor, Tensor]:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, eq. 7): DDIM with eta 1."""
    prediction = step.predict(step.x, step.t)
    return _add_noise(step, prediction, 1.0), prediction.x0


def _add_noise(step: Step, prediction: Prediction, eta: float) -> Tensor:
    if eta == 0:
        return step.first_order(prediction)
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = step.start, step.end
    # sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 is the variance that noising from s to t adds.
    added = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0.0)
    sigma_up = eta * (sigma_s / sigma_t) * torch.sqrt(added)
    sigma_down = torch.sqrt((sigma_s**2 - sigma_up**2).clamp(min=0.0))
    mean = scaled(alpha_s, prediction.x0) + scaled(sigma_down, prediction.eps)
    return mean + scaled(sigma_up, step.draw_noise())


def euler(step: Step) -> tuple[Tensor, Tensor]:
    """Euler's method in the ODE's own variable, see `_ode`; the same numbers as DDIM without noise."""
    return _ode(step, corrected=False)


def heun(step: Step) -> tuple[Tensor, Tensor]:
    """Heun's method (EDM, Karras et al. 2022, algorithm 1, without churn)."""
    return _ode(step, corrected=not step.to_clean_data)


def _ode(step: Step, corrected: bool) -> tuple[Tensor, Tensor]:
    """dz / dtau = direction, where `z = x / norm`, `tau = sigma / norm`.

    `norm` is alpha, so that the direction is eps (Karras et al. 2022, eq. 4); where alpha falls to 0, as in flow
    matching, it is `alpha + sigma`, and the direction `eps - x0`.
    """
    flow = step.noise_schedule.starts_without_signal

    def norm(level: Level) -> Tensor:
        return level.alpha + level.sigma if flow else level.alpha

    def direction(prediction: Prediction) -> Tensor:
        return prediction.eps - prediction.x0 if flow else prediction.eps

    norm_t, norm_s = norm(step.start), norm(step.end)
    delta = step.end.sigma / norm_s - step.start.sigma / norm_t
    prediction = step.predict(step.x, step.t)
    z, slope = scaled(1 / norm_t, step.x), direction(prediction)
    x_s = scaled(norm_s, z + scaled(delta, slope))
    if corrected:
        slope = (slope + direction(step.predict(x_s, step.s))) / 2
        x_s = scaled(norm_s, z + scaled(delta, slope))
    return x_s, prediction.x0


def dpm_2(step: Step) -> tuple[Tensor, Tensor]:
    """Singlestep DPM-Solver-2 (Lu et al. 2022, algorithm 1), r1 = 1/2."""
    _check_signal(step, "dpmpp_2s")
    x0, eps = prediction = step.predict(step.x, step.t)
    if step.to_clean_data:
        return step.first_order(prediction), x0
    r1 = 0.5
    t1 = _between(step, r1)
    eps_1 = step.predict(_eps_step(step, r1, eps), t1).eps
    return _eps_step(step, 1.0, eps + (eps_1 - eps) / (2 * r1)), x0


def dpm_3(step: Step) -> tuple[Tensor, Tensor]:
    """Singlestep DPM-Solver-3 (Lu et al. 2022, algorithm 2), r1 = 1/3, r2 = 2/3."""
    _check_signal(step, "dpmpp_3m")
    x0, eps = prediction = step.predict(step.x, step.t)
    if step.to_clean_data:
        return step.first_order(prediction), x0
    r1, r2, h = 1 / 3, 2 / 3, step.h
    t1, t2 = _between(step, r1), _between(step, r2)
    change_1 = step.predict(_eps_step(step, r1, eps), t1).eps - eps
    curve_2 = step.level(t2).sigma * (r2 / r1) * (torch.expm1(r2 * h) / (r2 * h) - 1)
    change_2 = step.predict(_eps_step(step, r2, eps) - scaled(curve_2, change_1), t2).eps - eps
    curve = step.end.sigma / r2 * (torch.expm1(h) / h - 1)
    return _eps_step(step, 1.0, eps) - scaled(curve, change_2), x0


def dpmpp_2s(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1), r1 = 1/2."""
    x0, _ = prediction = step.predict(step.x, step.t)
    if step.to_clean_data:
        return step.first_order(prediction), x0
    t1 = _between(step, 0.5)
    x0_1 = step.predict(_x0_step(step, t1, x0), t1).x0
    return _x0_step(step, step.s, x0_1), x0


def _check_signal(step: Step, instead: str) -> None:
    """A step multiplies the rounding of eps by up to alpha_s / alpha_t: from no signal at all, nothing is left."""
    if step.x.dtype != torch.float64 and bool((step.start.alpha < 1e-4).any()):
        message = "alpha_t is 0 where sampling starts; accepted, below float64: a grid from a lower time"
        raise ValueError(f"{message}, or a sampler in x0 such as {instead}")


def _between(step: Step, r: float) -> Tensor:
    """The time a fraction `r` of the way from lambda_t to lambda_s."""
    return step.noise_schedule.inverse_lambda(step.start.lambda_ + r * step.h)


def _eps_step(step: Step, r: float, eps: Tensor) -> Tensor:
    """x a fraction `r` of the way, with eps constant (DPM-Solver's first order)."""
    level = step.end if r == 1.0 else step.level(_between(step, r))
    return scaled(level.alpha / step.start.alpha, step.x) - scaled(level.sigma * torch.expm1(r * step.h), eps)


def _x0_step(step: Step, s: Tensor, x0: Tensor) -> Tensor:
    """x at `s`, with x0 constant (DPM-Solver++'s first order)."""
    level = step.level(s)
    shrink = torch.expm1(step.start.lambda_ - level.lambda_)
    return scaled(level.sigma / step.start.sigma, step.x) - scaled(level.alpha * shrink, x0)


ONESTEP = (
    Sampler.of_this_package("ddim", ddim),
    Sampler.of_this_package("ddpm", ddpm),
    Sampler.of_this_package("euler", euler),
    Sampler.of_this_package("heun", heun),
    Sampler.of_this_package("dpm_1", ddim),
    Sampler.of_this_package("dpm_2", dpm_2),
    Sampler.of_this_package("dpm_3", dpm_3),
    Sampler.of_this_package("dpmpp_2s", dpmpp_2s),
)
