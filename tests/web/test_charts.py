"""Charts, before they are drawn."""

import math
from datetime import timedelta
from itertools import pairwise

import pytest

from service.registry.tables import TuningJob, TuningJobEvent
from service.registry.types import utc_now
from service.web.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, make_chart
from service.web.views import job_charts


def chart(*points: tuple[float, float], log_y: bool = False) -> Chart:
    made = make_chart("title", "description", "x", "y", [Series("one", points)], log_y=log_y)
    assert made is not None
    return made


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_all_is_within_the_axes(scale: float, log_y: bool) -> None:
    drawn = chart((0, 0.5 * scale), (3, scale), (7, 700 * scale), log_y=log_y)
    for x, y in drawn.series[0].points:
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM
    assert all(LEFT <= x <= WIDTH - RIGHT for x, _ in drawn.x_ticks)
    assert all(TOP - 1e-6 <= y <= HEIGHT - BOTTOM + 1e-6 for y, _ in drawn.y_ticks)
    assert 2 <= len(drawn.y_ticks) <= 8


def test_ticks_are_where_their_labels_say() -> None:
    drawn = chart((0, 1), (10, 100), log_y=True)
    places = {label: y for y, label in drawn.y_ticks}
    (_, low), (_, high) = drawn.series[0].points
    assert (places["1"], places["100"]) == pytest.approx((low, high))
    assert places["10"] == pytest.approx((low + high) / 2)


def test_steps_are_whole_numbers() -> None:
    assert [label for _, label in chart((0, 0.1), (1, 0.2), (2, 0.4)).x_ticks] == ["0", "1", "2"]


def test_one_value_has_an_axis_too() -> None:
    assert len(chart((4, 1.25)).y_ticks) >= 2


def test_a_loss_is_a_share_of_its_first_by_seconds_and_smoothed_values_lie_between_their_neighbours() -> None:
    begin = utc_now()
    losses = (8.0, 2.0, 6.0, 1.0, 5.0, 0.5)
    events = [
        TuningJobEvent(
            type="progress", data={"progress": k / 9, "loss": loss}, created_at=begin + timedelta(seconds=3 * k)
        )
        for k, loss in enumerate(losses)
    ]
    made, _ = job_charts(TuningJob(steps=[]), events)
    assert made is not None
    shown = {name: [row for row in made.rows if row[1] == name] for name in ("as measured", "smoothed")}
    assert [row[0] for row in shown["as measured"]] == ["0", "3", "6", "9", "12", "15"]
    assert [float(row[2]) for row in shown["as measured"]] == [loss / 8 for loss in losses]
    smoothed = [float(row[2]) for row in shown["smoothed"]]
    assert smoothed[0] == 1
    assert all(abs(b - a) < 0.5 for a, b in pairwise(smoothed))
    for k in range(1, len(losses)):
        assert min(losses[: k + 1]) / 8 < smoothed[k] < max(losses[: k + 1]) / 8


def test_what_cannot_be_drawn_is_left_out() -> None:
    points = ((0, 1.0), (1, math.nan), (2, math.inf), (3, 0.0), (4, 2.0))
    assert [row[0] for row in chart(*points, log_y=True).rows] == ["0", "4"]
    assert make_chart("title", "description", "x", "y", [Series("one", [(0, math.nan)])]) is None
