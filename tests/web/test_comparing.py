"""Contents of comparisons, before they are drawn."""

import pytest

from service.registry.tables import EvaluationRow, Model, Schedule, ScheduleStatus
from service.web.comparing import gain_of, have_one_teacher, leaderboard, matrix
from service.web.views import group_of
from timetuner_core.catalog import SAMPLER_FACTS

ACCEPTED, REJECTED = ScheduleStatus.ACCEPTED, ScheduleStatus.REJECTED


def schedule(
    tuner: str, num_steps: int, score: float, status: ScheduleStatus = ACCEPTED, cost: int = 100, sampler: str = "ddim"
) -> Schedule:
    """A schedule whose distance to the teacher is its score, where the untuned one is 1."""
    figures = {"teacher_l2": {"before": 1.0, "after": score}}
    return Schedule(
        id=f"{tuner}-{num_steps}-{score}",
        model_id="m",
        sampler=sampler,
        num_steps=num_steps,
        guidance_type="uncond",
        guidance_scale=1,
        eta=0,
        clipping="own",
        status=status,
        score=score,
        timesteps=[1.0] * num_steps + [0.001],
        provenance={"tuner": {"objective": tuner}},
        evaluation=EvaluationRow(
            teacher_l2_before=1.0,
            teacher_l2_after=score,
            metrics=figures,
            network_calls=cost,
            seed=0,
            teacher_num_steps=100,
            num_samples=512,
        ),
    )


def test_a_cell_of_the_matrix_has_the_best_accepted_schedule_of_its_network_calls_or_else_the_newest() -> None:
    newest_first = [
        schedule("dmn", 4, 1.2, REJECTED),
        schedule("solver", 4, 0.6),
        schedule("end_to_end", 4, 0.8),
        schedule("dmn", 7, 1.1, REJECTED),
        schedule("end_to_end", 7, 1.3, REJECTED),
        schedule("end_to_end", 6, 0.9, sampler="heun"),
    ]
    made = matrix([Model(id="m"), Model(id="other")], newest_first)
    assert SAMPLER_FACTS["heun"].calls_per_step == 2
    (_, cells), (_, empty) = made.rows
    best = {calls: cell.best.id for calls, cell in zip(made.calls, cells, strict=True) if cell.best}
    assert best == {4: "solver-4-0.6", 7: "dmn-7-1.1", 12: "end_to_end-6-0.9"}
    assert {"accepted", "rejected", None} == {cell.verdict for cell in cells}
    assert not any(cell.best for cell in empty)
    assert gain_of(newest_first[1]) == pytest.approx(0.4)


def test_tuners_are_ranked_by_the_costs_at_which_they_are_closest_and_then_by_their_mean_score() -> None:
    rows = [
        schedule("dmn", 4, 0.9),
        schedule("dmn", 8, 1.2, REJECTED),
        schedule("solver", 4, 0.5, cost=300),
        schedule("solver", 8, 0.8, cost=100),
        schedule("ays", 4, 0.7),
    ]
    board = leaderboard(rows)
    assert [(place.tuner, place.wins, place.num_accepted) for place in board] == [
        ("solver", [4, 8], 2),
        ("ays", [], 1),
        ("dmn", [], 1),
    ]
    assert board[0].mean_score == pytest.approx((0.5 * 0.8) ** 0.5)
    assert board[0].mean_cost == 200


def test_schedules_of_other_sizes_are_not_compared_as_one_setting() -> None:
    small, large, either = (schedule("solver", 4, 0.5) for _ in range(3))
    small.call, small.call_key = {"height": 48, "width": 64}, "a"
    large.call, large.call_key = {"height": 96, "width": 64}, "b"
    either.call, either.call_key = {"strength": 0.5, "height": [48, 96], "width": [64, 64]}, "c"
    assert len({group_of(one).value for one in (small, large, either, schedule("solver", 4, 0.5))}) == 4
    assert group_of(small).guidance == "unguided, height 48, width 64"
    assert group_of(either).guidance == "unguided, height 48 to 96, width 64 to 64, strength 0.5"


def test_figures_are_comparable_only_of_one_model_guidance_and_teacher() -> None:
    a, b = schedule("dmn", 4, 0.9), schedule("solver", 8, 0.5)
    assert have_one_teacher(a, b)
    assert b.evaluation is not None
    b.evaluation.teacher_num_steps = 50
    assert not have_one_teacher(a, b)
