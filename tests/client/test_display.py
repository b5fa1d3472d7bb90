"""Schedules and evaluations as notebooks show them."""

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from PIL import Image

from service.client import Evaluation, Model, Resolution, Schedule
from service.client.results import TuningJobFields

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


@pytest.fixture
def ring() -> Model:
    spec: dict[str, Any] = {
        "sample_shape": [2, 8, 8],
        "image_shape": [1, 32, 32],
        "model_type": "noise",
        "T": 1.0,
        "num_train_timesteps": 1000,
        "num_classes": 10,
        "null_class_label": 10,
        "condition_shape": None,
        "guidance_types": ["uncond", "classifier-free"],
        "num_parameters": 1234,
        "has_uncond_condition": True,
        "has_conditions": True,
        "has_data": True,
    }
    fields: dict[str, Any] = {"id": "mdl_1", "name": "<ring>", "content_hash": "0", "spec": spec}
    return Model(**fields, created_at=datetime.now(UTC))


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


def test_a_model_is_a_table_of_its_facts(ring: Model) -> None:
    html = ring._repr_html_()
    assert "<td>&lt;ring&gt; (mdl_1)</td>" in html
    assert "a network that predicts noise" in html
    assert "<td>uncond, classifier-free</td>" in html
    assert "<th>latents</th><td>2 × 8 × 8</td>" in html
    assert "<td>1,234</td>" in html


def test_a_job_is_a_table_with_a_bar_until_it_is_over() -> None:
    now = datetime.now(UTC)
    request = {"sampler": "ddim", "num_steps": 5, "guidance_type": "classifier-free", "guidance_scale": 2.0}
    fields: dict[str, Any] = {"id": "tun_1", "owner": None, "model": "mdl_1", "request_id": None, "request": request}
    fields |= {"attempt": 1, "cancel_requested": False, "created_at": now, "started_at": now}
    running = {"state": "running", "progress": 0.25, "error": None, "schedule": None, "finished_at": None}
    times = {"phase": "tuning", "elapsed_seconds": 61.2, "remaining_seconds": 180.0}
    html = TuningJobFields(**fields, **running, **times)._repr_html_()
    assert "<td>ddim, 5 steps, classifier-free ×2, model mdl_1</td>" in html
    assert "<td>tuning</td>" in html
    assert "<td>61 s, 180 s left</td>" in html
    assert '<progress max="1" value="0.250">25%</progress>' in html
    failed = {"state": "failed", "progress": 0.25, "error": "<no> teacher", "schedule": None, "finished_at": now}
    html = TuningJobFields(**fields, **failed, **times)._repr_html_()
    assert "&lt;no&gt; teacher" in html
    assert "<progress" not in html
