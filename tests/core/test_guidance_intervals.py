"""One schedule for an interval of guidance scales, on a network whose guided samples are known in closed form."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.conftest import normals, tuner_of
from timetuner_core import NoiseScheduleVP
from timetuner_core.evaluation.teacher_check import TeacherError
from timetuner_core.evaluation.verdict import Evaluation, Metric, PairedComparison, of_scales
from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import SAMPLERS, sample
from timetuner_core.sampling.generate import Guidance
from timetuner_core.tuners import TUNERS, EndToEndTuner, SolverTuner
from timetuner_core.tuning.end_to_end import teach
from timetuner_core.tuning.per_step import tune_per_step
from timetuner_core.tuning.problem import TuningProblem, TuningState
from timetuner_core.tuning_setup import Experiment

LINEAR = NoiseScheduleVP("linear")
MEANS, STD = torch.tensor([[0.5, -0.3], [-0.4, 0.2], [0.0, 0.0]], dtype=torch.float64), 0.5
NULL = torch.tensor([2])
LOW, HIGH = 1.5, 7.5


def gaussians(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The exact eps of one Gaussian per label, of equal widths; that of the null label is around 0.

    So eps guided at scale s is that of a Gaussian around s times the label's mean.
    """
    alpha_t, sigma_t = LINEAR.marginal_alpha(t)[:, None], LINEAR.marginal_std(t)[:, None]
    return sigma_t * (x - alpha_t * MEANS[label]) / (alpha_t**2 * STD**2 + sigma_t**2)


def exact(x_T: Tensor, label: Tensor, scales: Tensor) -> Tensor:
    """Where guided sampling leads from x_T in infinitely many steps, `(B, 2)`: the affine map of two Gaussians."""
    ends = torch.tensor([LINEAR.T, LINEAR.t_min], dtype=torch.float64)
    alpha_T, alpha_0 = LINEAR.marginal_alpha(ends)
    std_T, std_0 = (LINEAR.marginal_alpha(ends) ** 2 * STD**2 + LINEAR.marginal_std(ends) ** 2).sqrt()
    mean = scales[:, None] * MEANS[label]
    return alpha_0 * mean + std_0 / std_T * (x_T - alpha_T * mean)


def problem_of(seed: int = 0, scales: Tensor | None = None, sampler: str = "ddim") -> TuningProblem:
    """Samples of both labels; their guidance scales are drawn from the interval, unless they are given."""
    generator = torch.Generator().manual_seed(seed)
    drawn = LOW + (HIGH - LOW) * torch.rand(64, generator=generator, dtype=torch.float64)
    model_fn = tuner_of(gaussians, LINEAR, guidance_type="classifier-free", guidance_scale=LOW).model_fn
    return TuningProblem(
        model_fn,
        LINEAR,
        SAMPLERS[sampler].step_fn(model_fn, LINEAR),
        make_timesteps(LINEAR, 4),
        normals(64, 2, seed=seed),
        torch.arange(64) % 2,
        batch_size=16,
        step_kwargs={"uncond_condition": NULL},
        guidance_scales=drawn if scales is None else scales,
    )


def distance(problem: TuningProblem, timesteps: Tensor, t_ratios: Tensor, sampler: Any = None) -> float:
    """How far samples are from where guided sampling leads, on average."""
    assert problem.condition is not None and problem.guidance_scales is not None
    every = torch.arange(len(problem.population))
    if sampler is not None:
        problem = dataclasses.replace(problem, step_fn=sampler.step_fn(problem.model_fn, LINEAR))
    kwargs = problem.step_kwargs_with(problem.condition, None)
    found = sample(problem.step_fn_of(every), problem.population, timesteps, t_ratios, **kwargs)
    target = exact(problem.population, problem.condition, problem.guidance_scales)
    return float((found - target).norm(dim=1).mean())


def last(states: Iterator[TuningState]) -> TuningState:
    *_, state = states
    return state


def test_the_teacher_guides_each_of_the_population_by_its_own_scale() -> None:
    problem = problem_of(sampler="dpmpp_2m")
    states = teach(problem, TuningState.start(problem.timesteps), make_timesteps(LINEAR, 400), [])
    with pytest.raises(StopIteration) as ended:
        while True:
            next(states)
    assert problem.condition is not None and problem.guidance_scales is not None
    target = exact(problem.population, problem.condition, problem.guidance_scales)
    assert torch.allclose(ended.value.value, target, atol=2e-3)


@pytest.mark.parametrize(
    "tuner",
    [
        SolverTuner(objective="solver", total_iters=3, start="best"),
        EndToEndTuner(total_iters=60, lr=0.03, start="best"),
    ],
    ids=lambda tuner: str(tuner.objective),
)
def test_a_schedule_for_an_interval_is_good_at_every_scale_within(tuner: SolverTuner | EndToEndTuner) -> None:
    problem = problem_of()
    state = last(tuner.run(problem, TuningState.start(problem.timesteps)))
    ddim = Experiment(load_builtin("mixture-ring"), Guidance("uncond", 1.0), SAMPLERS["ddim"])
    tuned = ddim.with_solver(state.solver_table, state.timesteps)
    for scale in (LOW, 2.3, (LOW + HIGH) / 2, 6.1, HIGH):
        held_out = problem_of(seed=1, scales=torch.full((64,), scale, dtype=torch.float64))
        ones = torch.ones(problem.num_steps)
        untuned = min(
            distance(held_out, make_timesteps(LINEAR, problem.num_steps, name), ones)
            for name in ("uniform", "quadratic", "log_snr", "edm")
        )
        assert distance(held_out, state.timesteps, state.t_ratios, tuned.sampler) < 0.3 * untuned


def test_an_experiment_draws_scales_from_the_whole_interval_apart_from_conditions() -> None:
    experiment = Experiment(
        load_builtin("mixture-ring"), Guidance("classifier-free", 1.0), SAMPLERS["ddim"], guidance_scales=(2.0, 6.0)
    )
    problem = experiment.problem("noise", make_timesteps(experiment.model.noise_schedule, 4), 512, 16)
    scales, condition = problem.guidance_scales, problem.condition
    assert scales is not None and condition is not None
    assert 2 <= float(scales.min()) < 2.1 and 5.9 < float(scales.max()) <= 6
    of_classes = torch.stack([scales[condition == label].mean() for label in range(4)])
    assert of_classes == pytest.approx(torch.full((4,), 4.0), abs=0.4)  # three standard errors
    again = experiment.problem("noise", problem.timesteps, 512, 16).guidance_scales
    assert again is not None and torch.equal(again, scales)


@pytest.mark.parametrize("objective", ["ays", "gits", "dc_solver", "dmn", "grid"])
def test_a_tuner_that_guides_all_alike_refuses_an_interval_by_its_name(objective: str) -> None:
    tuner: Any = TUNERS[objective](objective=objective)  # type: ignore[arg-type]
    assert not tuner.takes_guidance_interval
    problem = problem_of()
    with pytest.raises(ValueError, match=f"guidance_scales are given; accepted by the tuner {objective}"):
        last(tuner.run(problem, TuningState.start(problem.timesteps)))


def test_steps_tuned_one_by_one_refuse_an_interval() -> None:
    problem = problem_of()
    with pytest.raises(ValueError, match="guidance_scales are given; accepted by the tuner next_eps"):
        last(tune_per_step(problem, TuningState.start(problem.timesteps)))


def evaluation(low: float, high: float, after: float = 0.5) -> Evaluation:
    change = PairedComparison((low + high) / 2, low, high)
    return Evaluation({"teacher_l2": Metric("teacher_l2", 1.0, after, change)}, num_samples=16)


ACCEPTED, BARELY = evaluation(-0.6, -0.4), evaluation(-0.2, -0.1, 0.85)
UNDECIDED, REJECTED = evaluation(-0.1, 0.1, 1.0), evaluation(0.1, 0.2, 1.1)


@pytest.mark.parametrize(
    ("found", "verdict", "scale", "reason"),
    [
        ([ACCEPTED, ACCEPTED, BARELY], "accepted", 5.0, "at guidance scale 5 fell: teacher_l2"),
        ([ACCEPTED, UNDECIDED, ACCEPTED], "undecided", 3.0, "at guidance scale 3 did not fall beyond chance"),
        ([REJECTED, UNDECIDED, ACCEPTED], "rejected", 1.0, "at guidance scale 1 rose: teacher_l2"),
    ],
)
def test_a_schedule_is_accepted_only_if_it_is_at_all_scales_and_the_reason_names_the_one_that_decides(
    found: list[Evaluation], verdict: str, scale: float, reason: str
) -> None:
    whole = of_scales(dict(zip((1.0, 3.0, 5.0), found, strict=True)))
    assert (whole.verdict, whole.guidance_scale, list(whole.at_scales)) == (verdict, scale, [1.0, 3.0, 5.0])
    assert whole.reason.startswith(reason)
    assert [each.verdict for each in whole.at_scales.values()] == [each.verdict for each in found]
    assert whole.metrics == whole.at_scales[scale].metrics


def test_an_interval_is_evaluated_at_both_ends_and_in_the_middle_each_against_its_own_teacher() -> None:
    experiment = Experiment(
        load_builtin("mixture-ring"), Guidance("classifier-free", 1.0), SAMPLERS["ddim"], guidance_scales=(1.0, 4.0)
    )
    grid, ones = make_timesteps(experiment.model.noise_schedule, 4, "quadratic"), torch.ones(4, dtype=torch.float64)
    whole = experiment.evaluate(grid, ones, 32, 20)
    assert list(whole.at_scales) == [1.0, 2.5, 4.0]
    for scale, each in whole.at_scales.items():
        alone = Experiment(load_builtin("mixture-ring"), Guidance("classifier-free", scale), SAMPLERS["ddim"])
        assert each.metrics["teacher_l2"] == alone.evaluate(grid, ones, 32, 20).metrics["teacher_l2"]


def test_a_teacher_that_fails_its_check_at_one_scale_is_refused_by_it() -> None:
    guidance, sampler = Guidance("classifier-free", 1.0), SAMPLERS["dpmpp_2m"]
    experiment = Experiment(load_builtin("mixture-ring"), guidance, sampler)
    experiment.check_teacher(8)
    with pytest.raises(TeacherError, match=r"^at guidance scale 8 with half its steps its samples are others"):
        dataclasses.replace(experiment, guidance_scales=(1.0, 15.0)).check_teacher(8)
