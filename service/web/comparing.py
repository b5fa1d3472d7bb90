"""Comparisons: the matrix of models and network calls, the leaderboard of tuners, and two schedules."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.registry.tables import Model, Schedule, ScheduleStatus
from service.web.charts import Chart, Series, make_chart
from service.web.views import METRICS, figure, network_calls, tuner_of, verdict_of

# The matrix always has these numbers of network calls, beside those of the schedules that there are.
USUAL_CALLS = (3, 4, 5, 6, 8, 10, 12, 16, 20)


def gain_of(schedule: Schedule) -> float | None:
    """How much closer to the teacher than untuned, as a share of the untuned distance; None if it was not measured."""
    evaluation = schedule.evaluation
    if evaluation is None or not 0 < evaluation.teacher_l2_before < math.inf:
        return None
    return 1 - evaluation.teacher_l2_after / evaluation.teacher_l2_before


@dataclass
class Cell:
    """The schedules of a model with some number of network calls.

    Attributes:
        best: the accepted schedule of the lowest score; without any, the newest other.
    """

    best: Schedule | None = None

    def add(self, schedule: Schedule) -> None:
        """Take the schedule if it is better than the best so far. Schedules come newest first."""
        if self.best is None or _rank(schedule) < _rank(self.best):
            self.best = schedule

    @property
    def verdict(self) -> str | None:
        return None if self.best is None else verdict_of(self.best)


def _rank(schedule: Schedule) -> tuple[bool, float]:
    is_accepted = schedule.status == ScheduleStatus.ACCEPTED
    return (not is_accepted, (schedule.score or 0.0) if is_accepted else 0.0)


@dataclass
class Matrix:
    """A row of cells for each model, one for each number of network calls per image."""

    calls: list[int]
    rows: list[tuple[Model, list[Cell]]]


def matrix(models: Sequence[Model], schedules: Iterable[Schedule]) -> Matrix:
    """The matrix of these models and schedules, which come newest first."""
    cells: dict[tuple[str, int], Cell] = defaultdict(Cell)
    for schedule in schedules:
        calls = network_calls(schedule)
        if calls is not None:
            cells[schedule.model_id, calls].add(schedule)
    columns = sorted({*USUAL_CALLS, *(calls for _, calls in cells)})
    return Matrix(columns, [(model, [cells[model.id, calls] for calls in columns]) for model in models])


@dataclass
class Place:
    """A tuner's place among others, by its schedules of one model and setting.

    Attributes:
        wins: the numbers of network calls at which its best schedule is the closest of all to the teacher.
    """

    tuner: str
    schedules: list[Schedule] = field(default_factory=list)
    wins: list[int] = field(default_factory=list)

    @property
    def num_accepted(self) -> int:
        return sum(schedule.status == ScheduleStatus.ACCEPTED for schedule in self.schedules)

    @property
    def mean_score(self) -> float | None:
        """The geometric mean of the scores, which are ratios."""
        scores = [schedule.score for schedule in self.schedules if schedule.score]
        return math.exp(sum(map(math.log, scores)) / len(scores)) if scores else None

    @property
    def mean_cost(self) -> float:
        """Samples put through the network for a schedule."""
        costs = [schedule.evaluation.network_calls for schedule in self.schedules if schedule.evaluation]
        return sum(costs) / len(costs) if costs else 0.0


def leaderboard(schedules: Iterable[Schedule]) -> list[Place]:
    """The tuners of evaluated schedules of one model and setting: most wins first, then the lowest mean score."""
    places: dict[str, Place] = {}
    closest: dict[int, tuple[float, str]] = {}
    for schedule in schedules:
        tuner, calls, distance = tuner_of(schedule), network_calls(schedule), figure(schedule, "teacher_l2")
        places.setdefault(tuner, Place(tuner)).schedules.append(schedule)
        if calls is not None and distance is not None:
            closest[calls] = min(closest.get(calls, (math.inf, "")), (distance, tuner))
    for calls, (_, tuner) in sorted(closest.items()):
        places[tuner].wins.append(calls)
    return sorted(places.values(), key=lambda place: (-len(place.wins), place.mean_score or math.inf))


def metrics_of_both(a: Schedule, b: Schedule) -> list[tuple[str, list[float | None]]]:
    """Each figure that was measured of either: untuned and tuned by the one, untuned and tuned by the other."""
    names = [name for name in METRICS if any(figure(one, name) is not None for one in (a, b))]
    return [
        (METRICS[name], [figure(one, name, when) for one in (a, b) for when in ("before", "after")]) for name in names
    ]


def have_one_teacher(a: Schedule, b: Schedule) -> bool:
    """Whether the figures of two schedules are of the same model, guidance, noises and teacher."""
    if a.evaluation is None or b.evaluation is None:
        return False
    names = [name for name in Schedule.KEY if name not in ("sampler", "num_steps", "eta")]
    same_setting = all(getattr(a, name) == getattr(b, name) for name in names)
    facts = ("seed", "teacher_num_steps", "num_samples")
    return same_setting and all(getattr(a.evaluation, name) == getattr(b.evaluation, name) for name in facts)


def charts_of_both(a: Schedule, b: Schedule) -> list[Chart | None]:
    """The ratios and the time grids of two schedules, each over the part of its steps that is done."""

    def chart(title: str, label: str, description: str, values: Any) -> Chart | None:
        series = [
            Series(name, [(100 * step / one.num_steps, value) for step, value in enumerate(values(one))])
            for name, one in (("first", a), ("second", b))
        ]
        return make_chart(title, description, "steps done, %", label, series)

    ratios = "The ratio that each step's time is multiplied by before the network is told it; 1 is untuned."
    return [
        chart("Ratio of each step", "ratio", ratios, lambda one: one.t_ratios),
        chart("Time grid", "time", "Where the sampler is at each step.", lambda one: one.timesteps),
    ]
