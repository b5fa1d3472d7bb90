"""What a schedule is worth: how many steps the untuned sampler takes to come as near to the teacher."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Worth:
    """The untuned sampler's distance to the teacher by its number of steps, beside a schedule's.

    Attributes:
        teacher_l2: that of the schedule, from the same noise.
        grid: the untuned sampler's named grid, the best one at as many steps as the schedule has.
        untuned: the untuned sampler's mean distance to the teacher, by its number of steps.
        num_samples: how many noises it is from.
    """

    teacher_l2: float
    grid: str
    untuned: Mapping[int, float]
    num_samples: int

    @property
    def num_steps(self) -> float | None:
        """The untuned steps that come as near as the schedule, between two measured numbers by a line in logarithms.

        It is None for a schedule that comes nearer than all measured numbers of steps, or than none.
        """
        points = sorted(self.untuned.items())
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
        return self.teacher_l2 < min(self.untuned.values())

    def to_dict(self) -> dict[str, Any] | None:
        """A form that JSON takes; None if a distance is not finite."""
        if not all(map(math.isfinite, (self.teacher_l2, *self.untuned.values()))):
            return None
        untuned = [{"num_steps": steps, "teacher_l2": value} for steps, value in sorted(self.untuned.items())]
        names = ("num_steps", "is_beyond", "grid", "teacher_l2", "num_samples")
        return {name: getattr(self, name) for name in names} | {"untuned": untuned}
