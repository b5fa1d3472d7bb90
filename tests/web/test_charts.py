"""Charts, before they are drawn."""

import math

import pytest

from service.web.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, make_chart


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


def test_what_cannot_be_drawn_is_left_out() -> None:
    points = ((0, 1.0), (1, math.nan), (2, math.inf), (3, 0.0), (4, 2.0))
    assert [row[0] for row in chart(*points, log_y=True).rows] == ["0", "4"]
    assert make_chart("title", "description", "x", "y", [Series("one", [(0, math.nan)])]) is None
