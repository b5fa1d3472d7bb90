"""Least squares in one unknown per step, from noisy batches, until the estimate is sure enough."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of an estimate's memory: sums over samples of 1, h, u, h^2, h u and u^2.
MEMORY = 6

# Half-widths of the difference quotient. A network's sinusoidal time embedding gives the loss ripples a few hundredths
# apart: the coarse one looks past them, the fine one finds the bottom of the ripple where that led.
COARSE, FINE = 5e-3, 2e-3
# The first batches are measured by the coarse one, and forgotten afterwards.
COARSE_BATCHES = 6

# Largest change of a ratio in one iteration.
MAX_MOVE = 0.1

# A change of this size, beyond what chance makes, halves the weight of earlier batches.
HALVING_MOVE = 5e-3

# The scatter of heavy-tailed scores cannot be trusted after fewer batches.
MIN_BATCHES = COARSE_BATCHES + 6


def batches_at_once(batches: int) -> int:
    """How many to take before the next look, after so many: a quarter more, and a ratio moves but once for all."""
    return max(1, batches // 4)


@dataclass
class GaussNewton:
    """Ratios that make the sum of squared residuals least, `r -= <J, res> / <J, J>` over all batches so far.

    Each sample's residual is linear in the ratio, near where it was measured, so its score is
    `h r - u` with `h = <J, J>` and `u = h r - <J, res>`. Their sums say where the score vanishes, and their
    scatter how sure that is. The further a step leads, the more of what was measured before it is forgotten.

    Attributes:
        memory: `(K, MEMORY)`, float64. lower, upper: bounds of the ratios, `(K,)`.
        batches: how many it has had, each of the K.
    """

    memory: Tensor
    lower: Tensor
    upper: Tensor
    batches: int

    def __post_init__(self) -> None:
        if self.batches == COARSE_BATCHES:
            self.memory = torch.zeros_like(self.memory)

    def around(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """The ratios to measure residuals at: on both sides of `ratios` `(K,)`, inside the bounds."""
        half_width = COARSE if self.batches < COARSE_BATCHES else FINE
        return (ratios - half_width).clamp(min=self.lower), (ratios + half_width).clamp(max=self.upper)

    def add(self, of: Tensor, low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor) -> Tensor:
        """Take in batches: residuals `(N, B, D)`, the n-th of step `of[n]`, at two ratios per step, `(K,)` each.

        Returns:
            Each batch's mean loss between the two, `(N,)`.
        """
        jacobian = (at_high - at_low) / (high - low)[of, None, None]
        residual = (at_high + at_low) / 2
        h = jacobian.square().sum(dim=2)
        u = h * ((low + high) / 2)[of, None] - (jacobian * residual).sum(dim=2)
        sums = torch.stack([torch.ones_like(h), h, u, h * h, h * u, u * u], dim=2).sum(dim=1)
        self.memory = self.memory.index_add(0, of, sums)
        return residual.square().sum(dim=2).mean(dim=1)

    def step(self, ratios: Tensor) -> Tensor:
        """The next ratios, `(K,)`: bounded in size, and within the bounds."""
        moved = (ratios + (self._wanted(ratios) - ratios).clamp(-MAX_MOVE, MAX_MOVE)).clamp(self.lower, self.upper)
        keep = 1 / (1 + ((moved - ratios) / (HALVING_MOVE + 2 * self.standard_error(moved))).square())
        self.memory = self.memory * keep[:, None]
        return moved

    def settled(self, before: Tensor, after: Tensor, tolerance: float) -> Tensor:
        """Whether the estimates are surer than `tolerance`, or as surely beyond a bound, `(K,)`."""
        error = self.standard_error(after)
        beyond = (self._wanted(after) - after).abs() > 3 * error
        sure = (error < tolerance) & ((after - before).abs() < tolerance)
        at_bound = (after == before) & ((after == self.lower) | (after == self.upper)) & beyond
        return sure | at_bound

    def _wanted(self, ratios: Tensor) -> Tensor:
        """The ratios at which the score vanishes, bounds or not; `ratios` where nothing is known."""
        return torch.where(self.memory[:, 1] > 0, self.memory[:, 2] / self.memory[:, 1], ratios)

    def standard_error(self, ratios: Tensor) -> Tensor:
        """The estimate's standard error, `(K,)`: the root of the summed squared scores over the summed `h`."""
        _, sum_h, _, sum_hh, sum_hu, sum_uu = self.memory.unbind(dim=1)
        squares = ratios.square() * sum_hh - 2 * ratios * sum_hu + sum_uu
        return torch.where(sum_h > 0, squares.clamp(min=0).sqrt() / sum_h, torch.inf)
