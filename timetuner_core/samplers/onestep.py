"""Samplers that need no memory: DDIM and DDPM, Euler and Heun, singlestep DPM-Solver and DPM-Solver++."""

import torch
from torch import Tensor

from timetuner_core.coefficients import Coefficient, NoiseLevel
from timetuner_core.guided_model import Prediction
from timetuner_core.samplers.base import Sampler, Step


def ddim(step: Step) -> tuple[Tensor, Tensor]:
    """DDIM (Song et al. 2021, eq. 12); eta 0 is deterministic, 1 ancestral."""
    return _ancestral(step, step.eta)


def ddpm(step: Step) -> tuple[Tensor, Tensor]:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, eq. 7): DDIM with eta 1."""
    return _ancestral(step, 1.0)


def _ancestral(step: Step, eta: float) -> tuple[Tensor, Tensor]:
    """`x_s = alpha_s x0 + sigma_down eps + sigma_up z`, where `sigma_down^2 + sigma_up^2 = sigma_s^2`.

    `added = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2` is the variance that noising from s to t adds, and
    `sigma_up = eta sigma_s / sigma_t sqrt(added)`.
    """
    x0, eps = prediction = step.predict(step.x_t, step.t)
    if eta == 0:
        return step.first_order(prediction), x0
    alpha_t, sigma_t, alpha_s, sigma_s = step.alpha_t, step.sigma_t, step.alpha_s, step.sigma_s
    added = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0.0)
    sigma_up = eta * (sigma_s / sigma_t) * added.sqrt()
    sigma_down = (sigma_s**2 - sigma_up**2).clamp(min=0.0).sqrt()
    return alpha_s * x0 + sigma_down * eps + sigma_up * step.draw_noise(), x0


def euler(step: Step) -> tuple[Tensor, Tensor]:
    """Euler's method in the ODE's own variable, see `_ode`; the same numbers as DDIM without noise."""
    return _ode(step, corrected=False)


def heun(step: Step) -> tuple[Tensor, Tensor]:
    """Heun's method (EDM, Karras et al. 2022, algorithm 1, without churn)."""
    return _ode(step, corrected=not step.to_clean_data)


def _ode(step: Step, corrected: bool) -> tuple[Tensor, Tensor]:
    """`z_s = z_t + (tau_s - tau_t) dz/dtau`, where `z = x / norm` and `tau = sigma / norm`.

    `norm` is alpha, so that dz/dtau is eps (Karras et al. 2022, eq. 4). Where alpha falls to 0, as in flow matching,
    `norm` is `alpha + sigma` and dz/dtau is `eps - x0`. If `corrected`, dz/dtau is the mean of the two ends' values.
    """
    is_flow = step.noise_schedule.starts_without_signal

    def norm(level: NoiseLevel) -> Coefficient:
        return level.alpha + level.sigma if is_flow else level.alpha

    def slope(prediction: Prediction) -> Tensor:
        return prediction.eps - prediction.x0 if is_flow else prediction.eps

    norm_t, norm_s = norm(step.start), norm(step.end)
    step_size = step.sigma_s / norm_s - step.sigma_t / norm_t
    prediction = step.predict(step.x_t, step.t)
    z_t, slope_t = 1 / norm_t * step.x_t, slope(prediction)
    x_s = norm_s * (z_t + step_size * slope_t)
    if corrected:
        slope_s = slope(step.predict(x_s, step.s))
        x_s = norm_s * (z_t + step_size * ((slope_t + slope_s) / 2))
    return x_s, prediction.x0


def dpm_2(step: Step) -> tuple[Tensor, Tensor]:
    """Singlestep DPM-Solver-2 (Lu et al. 2022, algorithm 1), r1 = 1/2."""
    _check_signal(step, "dpmpp_2s")
    x0, eps = prediction = step.predict(step.x_t, step.t)
    if step.to_clean_data:
        return step.first_order(prediction), x0
    r1 = 0.5
    t_1 = step.time_between(r1)
    eps_1 = step.predict(_eps_step(step, r1, eps), t_1).eps
    return _eps_step(step, 1.0, eps + (eps_1 - eps) / (2 * r1)), x0


def dpm_3(step: Step) -> tuple[Tensor, Tensor]:
    """Singlestep DPM-Solver-3 (Lu et al. 2022, algorithm 2), r1 = 1/3, r2 = 2/3."""
    _check_signal(step, "dpmpp_3m")
    x0, eps = prediction = step.predict(step.x_t, step.t)
    if step.to_clean_data:
        return step.first_order(prediction), x0
    r1, r2, h = 1 / 3, 2 / 3, step.h
    t_1, t_2 = step.time_between(r1), step.time_between(r2)
    sigma_2 = step.noise_level(t_2).sigma
    change_1 = step.predict(_eps_step(step, r1, eps), t_1).eps - eps
    x_2 = _eps_step(step, r2, eps) - sigma_2 * (r2 / r1) * ((r2 * h).expm1() / (r2 * h) - 1) * change_1
    change_2 = step.predict(x_2, t_2).eps - eps
    return _eps_step(step, 1.0, eps) - step.sigma_s / r2 * (h.expm1() / h - 1) * change_2, x0


def dpmpp_2s(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1), r1 = 1/2."""
    x0, _ = prediction = step.predict(step.x_t, step.t)
    if step.to_clean_data:
        return step.first_order(prediction), x0
    t_1 = step.time_between(0.5)
    x0_1 = step.predict(_x0_step(step, step.noise_level(t_1), x0), t_1).x0
    return _x0_step(step, step.end, x0_1), x0


def _check_signal(step: Step, instead: str) -> None:
    """Refuse a start without signal: the step would multiply the rounding of eps by alpha_s / alpha_t."""
    if step.x_t.dtype != torch.float64 and bool((step.alpha_t.value < 1e-4).any()):
        message = "alpha_t is 0 where sampling starts; accepted, below float64: a grid from a lower time"
        raise ValueError(f"{message}, or a sampler in x0 such as {instead}")


def _eps_step(step: Step, r: float, eps: Tensor) -> Tensor:
    """`alpha / alpha_t x_t - sigma (e^(r h) - 1) eps` at a fraction `r` of the step: DPM-Solver's first order."""
    level = step.end if r == 1.0 else step.noise_level(step.time_between(r))
    return level.alpha / step.alpha_t * step.x_t - level.sigma * (r * step.h).expm1() * eps


def _x0_step(step: Step, level: NoiseLevel, x0: Tensor) -> Tensor:
    """`sigma / sigma_t x_t - alpha (e^(lambda_t - lambda) - 1) x0`, with x0 constant: DPM-Solver++'s first order."""
    shrink = (step.lambda_t - level.lambda_).expm1()
    return level.sigma / step.sigma_t * step.x_t - level.alpha * shrink * x0


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
