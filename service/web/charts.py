"""Charts: their coordinates are computed here, and the template `charts.html` draws them as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 40
TICKS = 5


@dataclass(frozen=True)
class Series:
    """Points by rising x; those that are not finite are left out. A faint one stands behind the others."""

    name: str
    points: Sequence[tuple[float, float]]
    is_faint: bool = False


@dataclass(frozen=True)
class Drawn:
    """A series in the picture's own coordinates."""

    name: str
    points: list[tuple[float, float]]
    is_faint: bool = False

    @property
    def line(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """A chart in the picture's coordinates, as the template draws it. Ticks are positions and their labels."""

    title: str
    description: str
    x_label: str
    y_label: str
    series: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    header: list[str]
    rows: list[list[str]]

    @property
    def size(self) -> dict[str, int]:
        return {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}


def make_chart(
    title: str, description: str, x_label: str, y_label: str, series: Sequence[Series], *, log_y: bool = False
) -> Chart | None:
    """A chart, or None if there is nothing to draw. A logarithmic axis leaves out values that are not positive."""
    kept = [replace(one, points=[p for p in one.points if _fits(p, log_y)]) for one in series]
    kept = [one for one in kept if one.points]
    if not kept:
        return None
    xs = [x for one in kept for x, _ in one.points]
    ys = [y for one in kept for _, y in one.points]
    x_axis, y_axis = _Axis(xs, LEFT, WIDTH - RIGHT), _Axis(ys, HEIGHT - BOTTOM, TOP, log_y)
    drawn = [Drawn(one.name, [(x_axis.place(x), y_axis.place(y)) for x, y in one.points], one.is_faint) for one in kept]
    header, rows = _table(x_label, kept)
    return Chart(title, description, x_label, y_label, drawn, x_axis.ticks(), y_axis.ticks(), header, rows)


class _Axis:
    """Maps values to positions between `start` and `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False) -> None:
        self._log = log
        self._whole = all(float(value).is_integer() for value in values)
        low, high = self._scaled(min(values)), self._scaled(max(values))
        margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        self._low, self._high = low - margin, high + margin
        self._start, self._end = start, end

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values, about `TICKS` of them."""
        values = self._logarithmic() if self._log else []
        return [(self.place(value), f"{value:.6g}") for value in (values if len(values) > 1 else self._even())]

    def _logarithmic(self) -> list[float]:
        """Ticks of a logarithmic axis: 1, 2 and 5 of each power of ten, or the powers alone, or only some of these."""
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        every = max(1, math.ceil(len(powers) / TICKS))
        digits = (1, 2, 5) if self._high - self._low < 2 else (1,)
        values = (digit * 10.0**power for power in powers[::every] for digit in digits)
        return [value for value in values if self._low <= math.log10(value) <= self._high]

    def _even(self) -> list[float]:
        """Evenly spaced ticks. They are whole numbers if all values are."""
        low, high = (10**self._low, 10**self._high) if self._log else (self._low, self._high)
        rough = max((high - low) / TICKS, 1.0 if self._whole else 0.0)
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
        return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _fits(point: tuple[float, float], log_y: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not log_y)


def _table(x_label: str, series: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    """The chart as a table with a row per point, for people who cannot see the picture."""
    rows = [(x, one.name, y) for one in series for x, y in one.points]
    return [x_label, "series", "value"], [[f"{x:.6g}", name, f"{y:.6g}"] for x, name, y in sorted(rows)]
