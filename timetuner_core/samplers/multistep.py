"""Samplers that remember earlier steps: DPM-Solver++ 2M and 3M, its SDE form, UniPC, iPNDM and DEIS.

The first steps, whose history is short, are of lower order; so is a step to time 0, where lambda is infinite (but for
iPNDM, which does not work in lambda).
"""

from functools import partial

import torch
from torch import Tensor

from timetuner_core.guided_model import Prediction
from timetuner_core.samplers.base import Sampler, Step, scaled


def _lambda(step: Step, back: int) -> Tensor:
    """lambda at an earlier step, 1 the newest."""
    return step.noise_schedule.marginal_lambda(step.history[-back].t)


def dpmpp_2m(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2)."""
    prediction = step.predict(step.x, step.t)
    if not step.history or step.to_clean_data:
        return step.first_order(prediction), prediction.x0
    return _x0_step(step, _extrapolated(step, prediction.x0)), prediction.x0


def dpmpp_2m_sde(step: Step) -> tuple[Tensor, Tensor]:
    """SDE-DPM-Solver++(2M): the same for the reverse SDE (Lu et al. 2022b, appendix)."""
    x0 = step.predict(step.x, step.t).x0
    if step.to_clean_data:
        return scaled(step.end.alpha, x0), x0
    target = _extrapolated(step, x0) if step.history else x0
    kept = -torch.expm1(-2 * step.h)
    mean = scaled(step.end.sigma / step.start.sigma * torch.exp(-step.h), step.x)
    mean = mean + scaled(step.end.alpha * kept, target)
    return mean + scaled(step.end.sigma * kept.sqrt(), step.draw_noise()), x0


def dpmpp_3m(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(3M): x0 as a parabola in lambda, its derivatives by divided differences."""
    if len(step.history) < 2 or step.to_clean_data:
        return dpmpp_2m(step)
    x0, h = step.predict(step.x, step.t).x0, step.h
    lambda_t, lambda_1, lambda_2 = step.start.lambda_, _lambda(step, 1), _lambda(step, 2)
    x0_1, x0_2 = step.history[-1].x0, step.history[-2].x0
    slope = scaled(1 / (lambda_t - lambda_1), x0 - x0_1)
    slope_1 = scaled(1 / (lambda_1 - lambda_2), x0_1 - x0_2)
    half_curve = scaled(1 / (lambda_t - lambda_2), slope - slope_1)
    slope = slope + scaled(lambda_t - lambda_1, half_curve)  # at t, rather than between t and the step before
    # Integrals of e^(lambda - lambda_s) times 1, (lambda - lambda_t) and its square over the step.
    phi_1 = -torch.expm1(-h)
    phi_2 = h - phi_1
    phi_3 = h**2 - 2 * phi_2
    change = scaled(phi_1, x0) + scaled(phi_2, slope) + scaled(phi_3, half_curve)
    return scaled(step.end.sigma / step.start.sigma, step.x) + scaled(step.end.alpha, change), x0


def _extrapolated(step: Step, x0: Tensor) -> Tensor:
    """x0 in the middle of the step, on the line through this one and the one before."""
    h_1 = step.start.lambda_ - _lambda(step, 1)
    return x0 + scaled(step.h / (2 * h_1), x0 - step.history[-1].x0)


def _x0_step(step: Step, x0: Tensor) -> Tensor:
    shrunk = scaled(step.end.sigma / step.start.sigma, step.x)
    return shrunk - scaled(step.end.alpha * torch.expm1(-step.h), x0)


def unipc(step: Step, order: int) -> tuple[Tensor, Tensor]:
    """UniPC with B(h) = e^h - 1 on x0 (Zhao et al. 2023, algorithms 5 to 8): corrects x_t by what the network says
    there, then predicts x_s; one call of the network for both."""
    x0 = step.predict(step.x, step.t).x0
    if step.to_clean_data:
        return scaled(step.end.alpha, x0), x0
    x = _unipc_corrected(step, x0, order) if step.history else step.x
    past = [(step.start.lambda_, x0)] + [
        (_lambda(step, k), step.history[-k].x0) for k in range(1, _remembered(step, order))
    ]
    base = scaled(step.end.sigma / step.start.sigma, x) - scaled(step.end.alpha * torch.expm1(-step.h), x0)
    return base - scaled(step.end.alpha * torch.expm1(-step.h), _unipc_sum(past, step.h, None)), x0


def _remembered(step: Step, order: int) -> int:
    return min(order, len(step.history) + 1)


def _unipc_corrected(step: Step, x0: Tensor, order: int) -> Tensor:
    """x_t by the corrector: the predictor's sum over earlier x0's is taken back for one that has x0 at t, too."""
    count = min(order, len(step.history))
    past = [(_lambda(step, k), step.history[-k].x0) for k in range(1, count + 1)]
    h = step.start.lambda_ - past[0][0]
    predicted, corrected = _unipc_sum(past, h, None), _unipc_sum(past, h, x0)
    return step.x + scaled(step.start.alpha * torch.expm1(-h), predicted - corrected)


def _unipc_sum(past: list[tuple[Tensor, Tensor]], h: Tensor, x0_end: Tensor | None) -> Tensor:
    """The sum of weights times scaled differences of x0 that UniP (or, with `x0_end`, UniC) adds to its base.

    `past` is (lambda, x0) from the step's start backwards; `h` the step in lambda.
    """
    (lambda_0, x0), earlier = past[0], past[1:]
    ratios = [(lambda_k - lambda_0) / h for lambda_k, _ in earlier]
    differences = [scaled(1 / r, x0_k - x0) for r, (_, x0_k) in zip(ratios, earlier, strict=True)]
    if x0_end is not None:
        ratios.append(torch.ones_like(h))
        differences.append(x0_end - x0)
    if not ratios:
        return torch.zeros_like(x0)
    weights = _unipc_weights(torch.stack(ratios, dim=-1), h)
    return torch.stack([scaled(w, d) for w, d in zip(weights.unbind(-1), differences, strict=True)]).sum(dim=0)


def _unipc_weights(ratios: Tensor, h: Tensor) -> Tensor:
    """The weights that make the sum exact for polynomials (Zhao et al. 2023, eq. 9): `(..., p)` for `(..., p)`.

    With a single difference they are taken as 1/2, as the paper does.
    """
    count = ratios.shape[-1]
    if count == 1:
        return torch.full_like(ratios, 0.5)
    rows, values = [], []
    b_h = torch.expm1(-h)
    phi = b_h / -h - 1
    factorial = 1
    for k in range(count):
        rows.append(ratios**k)
        values.append(phi * factorial / b_h)
        factorial *= k + 2
        phi = phi / -h - 1 / factorial
    solution: Tensor = torch.linalg.solve(torch.stack(rows, dim=-2), torch.stack(values, dim=-1))
    return solution


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(step: Step) -> tuple[Tensor, Tensor]:
    """iPNDM (Zhang & Chen 2023, after Liu et al. 2022): DDIM along the Adams-Bashforth mean of the last four eps.

    The coefficients are those of equal steps, whatever the grid.
    """
    x0, eps = prediction = step.predict(step.x, step.t)
    if not step.history:
        return step.first_order(prediction), x0
    all_eps = [eps] + [step.past_eps(past) for past in reversed(step.history)]
    mean = torch.stack([c * e for c, e in zip(ADAMS_BASHFORTH[len(step.history)], all_eps, strict=True)]).sum(dim=0)
    x0_mean = scaled(1 / step.start.alpha, step.x - scaled(step.start.sigma, mean))
    return step.first_order(Prediction(x0_mean, mean)), x0


def deis(step: Step) -> tuple[Tensor, Tensor]:
    """DEIS, tAB3 in log rho (Zhang & Chen 2023): `x / alpha` grows by the integral over `rho = sigma / alpha` of
    eps, extrapolated as a polynomial in `log rho = -lambda` through the last three."""
    x0, eps = prediction = step.predict(step.x, step.t)
    if not step.history or step.to_clean_data:
        return step.first_order(prediction), x0
    h, lambda_t = step.h, step.start.lambda_
    shrink = torch.exp(-h)
    # Integrals of e^w, w e^w and w^2 e^w over w = log rho - log rho_t, from 0 to -h.
    i_0, i_1, i_2 = torch.expm1(-h), 1 - (1 + h) * shrink, (h**2 + 2 * h + 2) * shrink - 2
    w_1, eps_1 = lambda_t - _lambda(step, 1), step.past_eps(step.history[-1])
    slope = scaled(1 / w_1, eps_1 - eps)
    integral = scaled(i_0, eps) + scaled(i_1, slope)
    if len(step.history) > 1:
        w_2, eps_2 = lambda_t - _lambda(step, 2), step.past_eps(step.history[-2])
        slope_1 = scaled(1 / (w_2 - w_1), eps_2 - eps_1)
        integral = integral + scaled(i_2 - w_1 * i_1, scaled(1 / w_2, slope_1 - slope))
    rho_t = step.start.sigma / step.start.alpha
    return scaled(step.end.alpha, scaled(1 / step.start.alpha, step.x) + scaled(rho_t, integral)), x0


MULTISTEP = (
    Sampler.of_this_package("dpmpp_2m", dpmpp_2m),
    Sampler.of_this_package("dpmpp_3m", dpmpp_3m),
    Sampler.of_this_package("dpmpp_2m_sde", dpmpp_2m_sde),
    Sampler.of_this_package("unipc_2", partial(unipc, order=2)),
    Sampler.of_this_package("unipc_3", partial(unipc, order=3)),
    Sampler.of_this_package("ipndm", ipndm),
    Sampler.of_this_package("deis", deis),
)
