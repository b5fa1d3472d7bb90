"""The check of a teacher before anything is judged by it.

A schedule that comes nearer to a bad teacher is no better. All distances here are relative to a spread, which is the
mean distance between two samples of one set. So they have no unit: equal sets are 0 apart.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The two samples of one noise may be this far apart, in spreads, with all of a teacher's steps and with half of them.
MAX_CHANGE_BY_HALF = 0.5
# Two sets may be this far apart. Samples whose standard deviation is 1.9 times the data's are.
MAX_DISTANCE = 0.15


class TeacherError(ValueError):
    """A teacher that nothing can be judged by."""


@dataclass(frozen=True)
class TeacherSamples:
    """Samples of a teacher, and what they are compared with, each `(B, ...)` or None.

    Attributes:
        samples: the teacher's. by_half: with half its steps, from the same noise.
        from_later: from a lower starting time.
        by_stock: on the grid that diffusers takes by default, with as many steps.
        data: `(P, ...)`; only where the samples are meant to be like the data, so not with guidance.
    """

    samples: Tensor
    by_half: Tensor | None = None
    from_later: Tensor | None = None
    by_stock: Tensor | None = None
    data: Tensor | None = None

    def check(self) -> None:
        """Refuse a teacher that fails. Raises: TeacherError."""
        if not bool(torch.isfinite(self.samples).all()):
            raise TeacherError("its samples are not finite")
        if self.by_half is not None:
            change = change_by_half(self.samples, self.by_half)
            _refuse(change, MAX_CHANGE_BY_HALF, "with half its steps its samples are others")
        if self.from_later is not None:
            distance = energy_distance(self.samples, self.from_later, same_noise=True)
            _refuse(distance, MAX_DISTANCE, "from another starting time its samples are distributed otherwise")
        if self.data is not None:
            _refuse(
                energy_distance(self.samples, self.data), MAX_DISTANCE, "its samples are not distributed as the data"
            )
        self._check_stock()

    def _check_stock(self) -> None:
        stock = self.by_stock
        if stock is None or not bool(torch.isfinite(stock).all()):
            return
        distance = energy_distance(self.samples, stock, same_noise=True)
        if self.data is None:
            # Samples that diverge are spread more widely, so the narrower of two sets that differ is the better one.
            is_worse = bool(spread(self.samples) > spread(stock))
        else:
            is_worse = energy_distance(self.samples, self.data) > energy_distance(stock, self.data)
        if is_worse:
            _refuse(distance, MAX_DISTANCE, "its samples are not distributed as those of diffusers' own time grid")


def spread(samples: Tensor) -> Tensor:
    """The mean distance between two of `(B, ...)`."""
    x = samples.flatten(1).double().cpu()
    return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))


def change_by_half(samples: Tensor, by_half: Tensor) -> float:
    """The mean distance of paired samples, both `(B, ...)`, in spreads of the first."""
    distance = torch.linalg.vector_norm((samples - by_half).flatten(1).double(), dim=1).mean()
    return float(distance.cpu() / spread(samples))


def energy_distance(samples: Tensor, reference: Tensor, *, same_noise: bool = False) -> float:
    """The energy distance (Székely & Rizzo 2013), `2 E|x - y| - E|x - x'| - E|y - y'|`, in spreads of the reference.

    The estimate has no bias, so that few samples of many dimensions do; it may be a little below 0.
    Shapes: `(B, ...)` and `(P, ...)`.

    Args:
        same_noise: the two were made from the same noise, in the same order. Such pairs are left out of E|x - y|.
    """
    x, y = samples.flatten(1).double().cpu(), reference.flatten(1).double().cpu()
    distances = torch.cdist(x, y)
    if same_noise:
        between = (distances.sum() - distances.diagonal().sum()) / (len(x) * (len(x) - 1))
    else:
        between = distances.mean()
    reference_spread = spread(reference)
    return float((2 * between - spread(samples) - reference_spread) / reference_spread)


def _refuse(figure: float, most: float, reason: str) -> None:
    if not figure <= most:
        shown = f"{figure:.3g}" if math.isfinite(figure) else "not finite"
        raise TeacherError(f"{reason}: the distance is {shown}; accepted: up to {most}")
