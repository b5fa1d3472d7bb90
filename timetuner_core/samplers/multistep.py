"""Samplers that remember earlier steps: DPM-Solver++ 2M and 3M, its SDE form, UniPC, iPNDM and DEIS.

The first steps, whose history is short, are of lower order; so is a step to time 0, where lambda is infinite (but for
iPNDM, which does not work in lambda). In the formulas, an index 1 or 2 means one or two steps back.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from timetuner_core.coefficients import Coefficient
from timetuner_core.guided_model import Prediction
from timetuner_core.samplers.base import Sampler, Step


def dpmpp_2m(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): `x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D`.

    `D = x0 + h / (2 h_1) (x0 - x0_1)` is x0 in the middle of the step, on the line through this one and the last.
    """
    x0, _ = prediction = step.predict(step.x_t, step.t)
    if not step.history or step.to_clean_data:
        return step.first_order(prediction), x0
    D = _extrapolated(step, x0)
    return step.sigma_s / step.sigma_t * step.x_t - step.alpha_s * (-step.h).expm1() * D, x0


def dpmpp_2m_sde(step: Step) -> tuple[Tensor, Tensor]:
    """SDE-DPM-Solver++(2M), for the reverse SDE (Lu et al. 2022b, appendix), with `D` of `dpmpp_2m`:

    `x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z`
    """
    x0 = step.predict(step.x_t, step.t).x0
    if step.to_clean_data:
        return step.alpha_s * x0, x0
    D = _extrapolated(step, x0) if step.history else x0
    sigma_t, alpha_s, sigma_s, h = step.sigma_t, step.alpha_s, step.sigma_s, step.h
    variance = -(-2 * h).expm1()
    mean = sigma_s / sigma_t * (-h).exp() * step.x_t + alpha_s * variance * D
    return mean + sigma_s * variance.sqrt() * step.draw_noise(), x0


def _extrapolated(step: Step, x0: Tensor) -> Tensor:
    """`x0 + h / (2 h_1) (x0 - x0_1)`."""
    h_1 = step.lambda_t - step.past_lambda(1)
    return x0 + step.h / (2 * h_1) * (x0 - step.past_x0(1))


def dpmpp_3m(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(3M): x0 as a parabola in lambda, its derivatives by divided differences.

    `x_s = sigma_s / sigma_t x_t + alpha_s (phi_1 x0 + phi_2 x0' + phi_3 x0'' / 2)`, where phi_1, phi_2 and phi_3 are
    the integrals of `e^(lambda - lambda_s)` times 1, `lambda - lambda_t` and its square over the step.
    """
    if len(step.history) < 2 or step.to_clean_data:
        return dpmpp_2m(step)
    x0, h = step.predict(step.x_t, step.t).x0, step.h
    lambda_t, lambda_1, lambda_2 = step.lambda_t, step.past_lambda(1), step.past_lambda(2)
    x0_1, x0_2 = step.past_x0(1), step.past_x0(2)
    slope_before_t = 1 / (lambda_t - lambda_1) * (x0 - x0_1)
    slope_before_1 = 1 / (lambda_1 - lambda_2) * (x0_1 - x0_2)
    half_curve = 1 / (lambda_t - lambda_2) * (slope_before_t - slope_before_1)
    slope_at_t = slope_before_t + (lambda_t - lambda_1) * half_curve
    phi_1 = -(-h).expm1()
    phi_2 = h - phi_1
    phi_3 = h**2 - 2 * phi_2
    change = phi_1 * x0 + phi_2 * slope_at_t + phi_3 * half_curve
    return step.sigma_s / step.sigma_t * step.x_t + step.alpha_s * change, x0


def unipc(step: Step, order: int, compensate: Callable[[Tensor], Tensor] = lambda x0: x0) -> tuple[Tensor, Tensor]:
    """UniPC with B(h) = e^h - 1 on x0 (Zhao et al. 2023, algorithms 5 to 8): corrects x_t by what the network says
    there, then predicts x_s; one call of the network for both.

    The predictor is `x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) (x0 + sum)`, with the sum of `_unipc_sum`.

    Args:
        compensate: what the predictor takes, and later steps remember, in place of the x0 that corrected x_t.
    """
    said = step.predict(step.x_t, step.t).x0
    x0 = compensate(said)
    if step.to_clean_data:
        return step.alpha_s * x0, x0
    past = [(step.past_lambda(k), step.past_x0(k)) for k in range(1, len(step.history) + 1)]
    x_t = _unipc_corrected(step, past[:order], said) if past else step.x_t
    points = [(step.lambda_t, x0), *past[: order - 1]]
    growth = step.alpha_s * (-step.h).expm1()
    return step.sigma_s / step.sigma_t * x_t - growth * x0 - growth * _unipc_sum(points, step.h, None), x0


def _unipc_corrected(step: Step, past: list[tuple[Coefficient, Tensor]], x0: Tensor) -> Tensor:
    """x_t by the corrector: the predictor's sum over `past` (lambda, x0) is replaced by one that has x0 at t, too."""
    h = step.lambda_t - past[0][0]
    predicted, corrected = _unipc_sum(past, h, None), _unipc_sum(past, h, x0)
    return step.x_t + step.alpha_t * (-h).expm1() * (predicted - corrected)


def _unipc_sum(points: list[tuple[Coefficient, Tensor]], h: Coefficient, x0_end: Tensor | None) -> Tensor:
    """`sum_k w_k / r_k (x0_k - x0)` with `r_k = (lambda_k - lambda) / h`, which UniP adds to its base.

    Args:
        points: (lambda, x0) from the step's start backwards. h: the step in lambda.
        x0_end: x0 at the step's end, where r is 1, which UniC has as well.
    """
    (lambda_0, x0), earlier = points[0], points[1:]
    ratios = [(lambda_k - lambda_0) / h for lambda_k, _ in earlier]
    differences = [1 / r * (x0_k - x0) for r, (_, x0_k) in zip(ratios, earlier, strict=True)]
    if x0_end is not None:
        ratios.append(Coefficient(torch.ones_like(h.value)))
        differences.append(x0_end - x0)
    if not ratios:
        return torch.zeros_like(x0)
    weights = _unipc_weights(ratios, h)
    return torch.stack([w * d for w, d in zip(weights, differences, strict=True)]).sum(dim=0)


def _unipc_weights(ratios: list[Coefficient], h: Coefficient) -> list[Coefficient]:
    """The weights that make the sum exact for polynomials (Zhao et al. 2023, eq. 9), one per ratio.

    A single weight is taken as 1/2, as the paper does.
    """
    if len(ratios) == 1:
        return [Coefficient(torch.full_like(h.value, 0.5))]
    rows, values = [], []
    b_h = (-h).expm1()
    phi = b_h / -h - 1
    factorial = 1
    for k in range(len(ratios)):
        rows.append(torch.stack([(r**k).value for r in ratios], dim=-1))
        values.append((phi * factorial / b_h).value)
        factorial *= k + 2
        phi = phi / -h - 1 / factorial
    solution: Tensor = torch.linalg.solve(torch.stack(rows, dim=-2), torch.stack(values, dim=-1))
    return [Coefficient(weight) for weight in solution.unbind(-1)]


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(step: Step) -> tuple[Tensor, Tensor]:
    """iPNDM (Zhang & Chen 2023, after Liu et al. 2022): DDIM along the Adams-Bashforth mean of the last four eps.

    The coefficients are those of equal steps, whatever the grid.
    """
    x0, eps = prediction = step.predict(step.x_t, step.t)
    if not step.history:
        return step.first_order(prediction), x0
    num_earlier = len(step.history)
    all_eps = [eps, *(step.past_eps(k) for k in range(1, num_earlier + 1))]
    mean = torch.stack([c * e for c, e in zip(ADAMS_BASHFORTH[num_earlier], all_eps, strict=True)]).sum(dim=0)
    x0_mean = 1 / step.alpha_t * (step.x_t - step.sigma_t * mean)
    return step.first_order(Prediction(x0_mean, mean)), x0


def deis(step: Step) -> tuple[Tensor, Tensor]:
    """DEIS, tAB3 in log rho (Zhang & Chen 2023), where `rho = sigma / alpha` and `log rho = -lambda`.

    `x_s = alpha_s (x_t / alpha_t + rho_t integral)`: the integral over rho of eps, extrapolated through the last three
    as a polynomial in `w = log rho - log rho_t`. i_0, i_1 and i_2 are the integrals of e^w, w e^w and w^2 e^w from 0
    to -h.
    """
    x0, eps = prediction = step.predict(step.x_t, step.t)
    if not step.history or step.to_clean_data:
        return step.first_order(prediction), x0
    h, lambda_t = step.h, step.lambda_t
    shrink = (-h).exp()
    i_0, i_1, i_2 = (-h).expm1(), 1 - (1 + h) * shrink, (h**2 + 2 * h + 2) * shrink - 2
    w_1, eps_1 = lambda_t - step.past_lambda(1), step.past_eps(1)
    slope = 1 / w_1 * (eps_1 - eps)
    integral = i_0 * eps + i_1 * slope
    if len(step.history) > 1:
        w_2, eps_2 = lambda_t - step.past_lambda(2), step.past_eps(2)
        slope_1 = 1 / (w_2 - w_1) * (eps_2 - eps_1)
        integral = integral + (i_2 - w_1 * i_1) * (1 / w_2 * (slope_1 - slope))
    rho_t = step.sigma_t / step.alpha_t
    return step.alpha_s * (1 / step.alpha_t * step.x_t + rho_t * integral), x0


UNIPC_ORDERS = {"unipc_2": 2, "unipc_3": 3}

MULTISTEP = (
    Sampler.of_this_package("dpmpp_2m", dpmpp_2m),
    Sampler.of_this_package("dpmpp_3m", dpmpp_3m),
    Sampler.of_this_package("dpmpp_2m_sde", dpmpp_2m_sde),
    *(Sampler.of_this_package(name, partial(unipc, order=order)) for name, order in UNIPC_ORDERS.items()),
    Sampler.of_this_package("ipndm", ipndm),
    Sampler.of_this_package("deis", deis),
)
