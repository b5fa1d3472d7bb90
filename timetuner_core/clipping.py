"""Clipping the predicted x0, where a model's scheduler asks for it and the sampler's diffusers class does it.

The names of what clips, and which samplers do, are plain data: this module is imported without PyTorch, too.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NO_CLIPPING = "none"
EXAMPLE = "clip_sample_range=1"
# The fields of a scheduler's configuration by which a text says how x0 is clipped.
FIELDS = {
    "clip_sample_range": "sample_range",
    "dynamic_thresholding_ratio": "quantile",
    "sample_max_value": "max_value",
}


@dataclass(frozen=True)
class Clipping:
    """The clipping of x0 that a scheduler's configuration asks for.

    Attributes:
        sample_range: x0 is clipped to -sample_range..sample_range; None does not clip (`clip_sample`).
        quantile: dynamic thresholding (Imagen, Saharia et al. 2022): each sample is clipped to this quantile of its
            absolute values, if that is above 1, and divided by it; None does not (`thresholding`).
        max_value: the most that the quantile counts as (`sample_max_value`).
    """

    sample_range: float | None = None
    quantile: float | None = None
    max_value: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Clipping | None":
        """The clipping that `clipping_text` writes, fields in any order; None for `none`.

        Raises:
            ValueError: another text; it says what is accepted.
        """
        if text == NO_CLIPPING:
            return None
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = part.partition("=")
            values[name] = _positive(name, number)
            if name not in FIELDS or len(values) > len(FIELDS):
                raise ValueError(f"{name[:100]!r} is no clipping; accepted: {NO_CLIPPING}, or {', '.join(FIELDS)}")
        if len(values) < text.count(",") + 1:
            raise ValueError(f"a field comes twice; accepted: each once, such as {EXAMPLE}")
        if values.get("dynamic_thresholding_ratio", 1.0) > 1:
            raise ValueError("dynamic_thresholding_ratio is above 1; accepted: above 0, up to 1")
        if "sample_max_value" in values and "dynamic_thresholding_ratio" not in values:
            raise ValueError("sample_max_value needs a dynamic_thresholding_ratio; accepted: both")
        return cls(**{FIELDS[name]: value for name, value in values.items()})

    def threshold(self, x0: "Tensor") -> "Tensor":
        """x0 `(B, ...)` after dynamic thresholding. Raises: AssertionError, without a `quantile`."""
        assert self.quantile is not None
        limit = x0.detach().abs().flatten(1).quantile(self.quantile, dim=1).clamp(min=1.0, max=self.max_value)
        limit = limit.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) / limit


def clipping_text(clipping: Clipping | None) -> str:
    """A clipping by the names of a scheduler's configuration, such as `clip_sample_range=1`; `none` for none.

    Equal clippings have equal texts.
    """
    if clipping is None:
        return NO_CLIPPING
    values = {name: getattr(clipping, attribute) for name, attribute in FIELDS.items()}
    if clipping.quantile is None or clipping.max_value == 1:
        del values["sample_max_value"]
    return ",".join(f"{name}={value:.12g}" for name, value in values.items() if value is not None)


def _positive(name: str, number: str) -> float:
    """Raises: ValueError."""
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name[:100]!r} is {number[:100]!r}; accepted: a number above 0, such as {EXAMPLE}")
    return value


@dataclass(frozen=True)
class ClipRule:
    """The clipping that a sampler's diffusers class does, and whether eps then follows x0."""

    clips: bool
    thresholds: bool
    eps_follows: bool = True

    def ignores(self, clipping: Clipping | None) -> list[str]:
        """The fields of a clipping that the sampler has no use for."""
        if clipping is None:
            return []
        ignored = [] if self.clips or clipping.sample_range is None else ["clip_sample_range"]
        return ignored if self.thresholds or clipping.quantile is None else [*ignored, "dynamic_thresholding_ratio"]

    def acts(self, clipping: Clipping) -> bool:
        """Whether the sampler does something to x0."""
        return (self.thresholds and clipping.quantile is not None) or (self.clips and clipping.sample_range is not None)

    def clip(self, clipping: Clipping, x0: "Tensor") -> "Tensor | None":
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


def clips(sampler: str, clipping: Clipping | None) -> bool:
    """Whether the sampler by a name clips x0."""
    rule = CLIP_RULES.get(sampler)
    return clipping is not None and rule is not None and rule.acts(clipping)


def keeps_eps(sampler: str, clipping: Clipping | None) -> bool:
    """Whether the sampler by a name clips x0 and goes on with the eps that was predicted."""
    return clips(sampler, clipping) and not CLIP_RULES[sampler].eps_follows
