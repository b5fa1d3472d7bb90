"""Schedules and evaluations as notebooks show them."""

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from PIL import Image

from service.client import Evaluation, Resolution, Schedule

METRICS = {
    "teacher_l2": {"before": 1.0, "after": 0.75, "change": -0.25, "low": -0.3125, "high": -0.1875},
    "frechet": {"before": 0.5, "after": None, "change": None, "low": None, "high": None},
}


@pytest.fixture
def evaluation() -> Evaluation:
    fields: dict[str, Any] = {
        "num_samples": 512,
        "teacher_num_steps": 100,
        "seed": 0,
        "teacher_l2_before": 1.0,
        "teacher_l2_after": 0.75,
        "teacher_l2_change_low": -0.3125,
        "teacher_l2_change_high": -0.1875,
        "frechet_before": None,
        "frechet_after": None,
        "metrics": METRICS,
        "reason": "closer <b>beyond chance</b>",
        "wall_time_seconds": 1.0,
        "network_calls": 1,
    }
    return Evaluation(**fields)


@pytest.fixture
def schedule(evaluation: Evaluation) -> Schedule:
    fields: dict[str, Any] = {
        "id": "sch_1",
        "job": None,
        "model": "<script>",
        "sampler": "ddim",
        "num_steps": 2,
        "guidance_type": "classifier-free",
        "guidance_scale": 2.5,
        "guidance_rescale": 0,
        "guidance_start": 0,
        "guidance_end": 1000,
        "eta": 0,
        "version": 4,
        "status": "accepted",
        "score": 0.75,
        "timesteps": [1.0, 0.5, 0.001],
        "t_ratios": [0.9, 1.1],
        "provenance": {},
        "evaluation": evaluation,
        "created_at": datetime.now(UTC),
    }
    return Schedule(**fields)


def test_an_evaluation_is_a_table_of_intervals_and_a_picture(evaluation: Evaluation) -> None:
    html = evaluation._repr_html_()
    row = "<td>teacher_l2</td><td>1</td><td>0.75</td><td>-0.25</td><td>-0.3125 to -0.1875</td>"
    unknown = "<td>frechet</td><td>0.5</td><td>–</td><td>–</td><td>–</td>"
    assert row in html
    assert unknown in html
    assert "closer &lt;b&gt;beyond chance" in html
    assert Image.open(io.BytesIO(evaluation._repr_png_())).size[0] == 500


def test_a_schedule_is_a_table_with_a_picture_of_ratios_and_grid(schedule: Schedule) -> None:
    html = schedule._repr_html_()
    assert "ddim, 2 steps, classifier-free ×2.5, model &lt;script&gt;" in html
    assert "accepted, version 4" in html
    assert '<img alt="ratios and grid against the step" src="data:image/png;base64,' in html
    assert "-0.3125 to -0.1875" in html
    plain, moved = (Image.open(io.BytesIO(each._repr_png_())) for each in (schedule, _with_ratios(schedule, [1, 1])))
    assert plain.size == (500, 360)
    assert plain.tobytes() != moved.tobytes()


def test_a_resolution_says_why_and_shows_its_schedule_if_there_is_one(schedule: Schedule) -> None:
    shown = Resolution(schedule=schedule, reason="the lowest score < 1")._repr_html_()
    assert "the lowest score &lt; 1" in shown
    assert "sch_1" in shown
    assert Resolution(schedule=None, reason="untuned")._repr_html_() == "<div><p>untuned</p></div>"


def _with_ratios(schedule: Schedule, t_ratios: list[float]) -> Schedule:
    return schedule.model_copy(update={"t_ratios": t_ratios})
