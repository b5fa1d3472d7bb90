"""alpha_t, sigma_t and lambda_t, ready to multiply x_t in a formula."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, overload

from torch import Tensor

from timetuner_core.noise_schedule import NoiseSchedule


class Coefficient:
    """A factor of x in a formula: one for the whole batch, or one per sample.

    Coefficients are computed with each other in the precision of time, float64. The product with an x `(B, ...)` has
    x's dtype and device: `sigma_s / sigma_t * x_t` rounds the quotient once, to x_t's dtype.

    Attributes:
        value: `()` or `(B, 1, ..., 1)`, which broadcasts with x.
    """

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @overload
    def __mul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __mul__(self, other: "Number") -> "Coefficient": ...
    def __mul__(self, other: "Tensor | Number") -> "Tensor | Coefficient":
        """The product with x is a tensor like x; the product with a number or another coefficient is a coefficient."""
        if isinstance(other, Tensor):
            return self.value.to(other.device, other.dtype) * other
        return Coefficient(self.value * _value(other))

    def __add__(self, other: "Number") -> "Coefficient":
        return Coefficient(self.value + _value(other))

    def __sub__(self, other: "Number") -> "Coefficient":
        return Coefficient(self.value - _value(other))

    def __truediv__(self, other: "Number") -> "Coefficient":
        return Coefficient(self.value / _value(other))

    def __rmul__(self, other: float) -> "Coefficient":
        return Coefficient(other * self.value)

    def __radd__(self, other: float) -> "Coefficient":
        return Coefficient(other + self.value)

    def __rsub__(self, other: float) -> "Coefficient":
        return Coefficient(other - self.value)

    def __rtruediv__(self, other: float) -> "Coefficient":
        return Coefficient(other / self.value)

    def __neg__(self) -> "Coefficient":
        return Coefficient(-self.value)

    def __pow__(self, exponent: int) -> "Coefficient":
        return Coefficient(self.value**exponent)

    def exp(self) -> "Coefficient":
        return Coefficient(self.value.exp())

    def expm1(self) -> "Coefficient":
        return Coefficient(self.value.expm1())

    def sqrt(self) -> "Coefficient":
        return Coefficient(self.value.sqrt())

    def clamp(self, min: float) -> "Coefficient":
        return Coefficient(self.value.clamp(min=min))


Number: TypeAlias = Coefficient | float


def _value(other: Number) -> Tensor | float:
    return other.value if isinstance(other, Coefficient) else other


@dataclass(frozen=True)
class NoiseLevel:
    """alpha, sigma and lambda of a noise schedule at the time `t`, `()` or `(B, 1, ..., 1)`."""

    noise_schedule: NoiseSchedule
    t: Tensor

    @classmethod
    def at(cls, noise_schedule: NoiseSchedule, t: Tensor, x: Tensor) -> "NoiseLevel":
        """The noise level at `t`, `()` or `(B,)`, of samples like x, `(B, ...)`."""
        return cls(noise_schedule, t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t)

    @cached_property
    def alpha(self) -> Coefficient:
        return Coefficient(self.noise_schedule.marginal_alpha(self.t))

    @cached_property
    def sigma(self) -> Coefficient:
        return Coefficient(self.noise_schedule.marginal_std(self.t))

    @cached_property
    def lambda_(self) -> Coefficient:
        return Coefficient(self.noise_schedule.marginal_lambda(self.t))
