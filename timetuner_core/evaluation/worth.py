"""The untuned sampler's distances to the teacher, and what a schedule is worth: how many untuned steps come as near."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from timetuner_core.catalog import NamedGrid


@dataclass(frozen=True)
class UntunedCurve:
    """The untuned sampler's distance to the teacher by its number of steps.

    Attributes:
        grid: its named grid, the best one at as many steps as a schedule of the setting has.
        untuned: its mean distance to the teacher on that grid, by its number of steps.
        num_samples: how many noises it is from.
    """

    grid: NamedGrid
    untuned: Mapping[int, float]
    num_samples: int

    def to_dict(self) -> dict[str, Any] | None:
        """A form that JSON takes; None if a distance is not finite."""
        if not all(map(math.isfinite, self.untuned.values())):
            return None
        untuned = [[steps, value] for steps, value in sorted(self.untuned.items())]
        return {"grid": self.grid, "untuned": untuned, "num_samples": self.num_samples}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UntunedCurve":
        """The curve that `to_dict` wrote."""
        return cls(values["grid"], dict(values["untuned"]), values["num_samples"])


@dataclass(frozen=True)
class Worth:
    """An untuned sampler's curve, beside a schedule.

    Attributes:
        teacher_l2: the schedule's mean distance to the teacher, from the curve's noise.
        curve: the untuned sampler's, of the same setting.
    """

    teacher_l2: float
    curve: UntunedCurve

    @property
    def num_steps(self) -> float | None:
        """The untuned steps that come as near as the schedule, between two measured numbers by a line in logarithms.

        It is None for a schedule that comes nearer than all measured numbers of steps, or than none.
        """
        points = sorted(self.curve.untuned.items())
        for (fewer, far), (more, near) in pairwise(points):
            if near <= self.teacher_l2 <= far:
                if min(near, self.teacher_l2) <= 0 or near == far:
                    return float(more)
                share = math.log(far / self.teacher_l2) / math.log(far / near)
                return float(fewer * (more / fewer) ** share)
        return None

    @property
    def is_beyond(self) -> bool:
        """Whether the schedule comes nearer than the untuned sampler with any number of steps that was measured."""
        return self.teacher_l2 < min(self.curve.untuned.values())

    def to_dict(self) -> dict[str, Any] | None:
        """A form that JSON takes; None if a distance is not finite."""
        curve = self.curve
        if not all(map(math.isfinite, (self.teacher_l2, *curve.untuned.values()))):
            return None
        untuned = [{"num_steps": steps, "teacher_l2": value} for steps, value in sorted(curve.untuned.items())]
        own = {name: getattr(self, name) for name in ("num_steps", "is_beyond", "teacher_l2")}
        return own | {"grid": curve.grid, "num_samples": curve.num_samples, "untuned": untuned}
