"""Clipping the predicted x0, where a model's scheduler asks for it and the sampler's diffusers class does it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipping:
    """What a scheduler's configuration says of clipping x0.

    Attributes:
        sample_range: x0 is clipped to -sample_range..sample_range; None does not clip (`clip_sample`).
        quantile: dynamic thresholding (Imagen, Saharia et al. 2022): each sample is clipped to this quantile of its
            absolute values, if that is above 1, and divided by it; None does not (`thresholding`).
        max_value: the most that the quantile counts as (`sample_max_value`).
    """

    sample_range: float | None = None
    quantile: float | None = None
    max_value: float = 1.0

    def threshold(self, x0: Tensor) -> Tensor:
        """x0 `(B, ...)` after dynamic thresholding. Raises: AssertionError, without a `quantile`."""
        assert self.quantile is not None
        limit = torch.quantile(x0.detach().abs().flatten(1), self.quantile, dim=1).clamp(min=1.0, max=self.max_value)
        limit = limit.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) / limit


@dataclass(frozen=True)
class ClipRule:
    """Which of the two a sampler's diffusers class does, and whether eps then follows x0."""

    clips: bool
    thresholds: bool
    eps_follows: bool = True

    def clip(self, clipping: Clipping, x0: Tensor) -> Tensor | None:
        """The clipped x0, or None where nothing is to be done. Thresholding goes first, as in diffusers."""
        if self.thresholds and clipping.quantile is not None:
            return clipping.threshold(x0)
        if self.clips and clipping.sample_range is not None:
            return x0.clamp(-clipping.sample_range, clipping.sample_range)
        return None


THRESHOLDS = ClipRule(clips=False, thresholds=True)
# Samplers that are not named here do neither, as their diffusers classes (Euler's, iPNDM's).
CLIP_RULES = {
    "ddim": ClipRule(clips=True, thresholds=True, eps_follows=False),
    "ddpm": ClipRule(clips=True, thresholds=True),
    "heun": ClipRule(clips=True, thresholds=False),
    **dict.fromkeys(("dpm_1", "dpm_2", "dpm_3", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"), THRESHOLDS),
    **dict.fromkeys(("unipc_2", "unipc_3", "deis"), THRESHOLDS),
}
