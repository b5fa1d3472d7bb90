"""Measures of a sampler against closed forms, scipy and simulation."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import bootstrap as scipy_bootstrap
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from tests.core.conftest import normals, small_mixture
from timetuner_core import NoiseScheduleVP, model_wrapper
from timetuner_core.catalog import NamedGrid
from timetuner_core.evaluation.distances import (
    MAX_FRECHET_DIMENSION,
    Frechet,
    Measure,
    SlicedWasserstein,
    frechet_distance,
    sampler_kl,
    sliced_wasserstein,
    teacher_l2,
    wasserstein,
    wasserstein_estimate,
)
from timetuner_core.evaluation.verdict import (
    Evaluation,
    Metric,
    PairedComparison,
    bootstrap,
    evaluate,
    paired_comparison,
)
from timetuner_core.evaluation.worth import UntunedCurve, Worth
from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import load_builtin
from timetuner_core.models.mixtures import GaussianMixture
from timetuner_core.samplers import SAMPLERS, get_sampler
from timetuner_core.samplers import sample as sampled
from timetuner_core.sampling.generate import Guidance
from timetuner_core.tuners import MAX_WORTH_SAMPLES
from timetuner_core.tuning_setup import EVALUATION_SEEDS, Experiment

ALL_METRICS = ("teacher_l2", "frechet", "frechet_features", "sliced_wasserstein", "wasserstein", "kl")


def standardised(*shape: int, seed: int) -> Tensor:
    """Samples whose own mean is exactly 0 and covariance exactly I."""
    x = normals(*shape, seed=seed)
    x = x - x.mean(dim=0)
    scaled: Tensor = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.atleast_2d(x.T.cov())), x.T, upper=False
    ).T
    return scaled


def test_teacher_l2_is_each_samples_euclidean_distance() -> None:
    samples = torch.zeros(2, 1, 2, 2)
    teacher = torch.tensor([[3.0, 0.0, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).reshape(2, 1, 2, 2)
    assert teacher_l2(samples, teacher).tolist() == [5.0, 2.0]


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    a, b = standardised(50, 3, seed=0), standardised(70, 3, seed=1)
    stds = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    # The distance of N(0, I) and N(shift, diag(stds^2)) is |shift|^2 + sum (1 - std)^2.
    assert frechet_distance(a, b * stds + shift) == pytest.approx(5.0 + 1.0 + 0.25, abs=1e-9)


@pytest.mark.parametrize("num_samples", [40, 5])  # 5 leave the covariance singular
def test_frechet_distance_is_that_of_the_matrix_square_root(num_samples: int) -> None:
    mixing = normals(8, 8, seed=2)
    a, b = normals(num_samples, 2, 2, 2), (normals(60, 8, seed=1) @ mixing + 0.3).reshape(60, 2, 2, 2)
    flat_a, flat_b = a.flatten(1).numpy(), b.flatten(1).numpy()
    cov_a, cov_b = np.cov(flat_a.T), np.cov(flat_b.T)
    difference = flat_a.mean(axis=0) - flat_b.mean(axis=0)
    expected = difference @ difference + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_to_itself_is_zero_and_symmetric() -> None:
    a, b = normals(40, 6), normals(40, 6, seed=1) * 2
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_of_single_values() -> None:
    a, b = standardised(30, 1, seed=0), 3.0 * standardised(30, 1, seed=1) + 1.0
    assert frechet_distance(a, b) == pytest.approx(1.0 + 4.0, abs=1e-9)


def test_frechet_distance_is_not_tried_on_samples_too_large_for_a_covariance() -> None:
    assert frechet_distance(*(torch.zeros(2, MAX_FRECHET_DIMENSION + 1),) * 2) is None


def test_paired_comparison_is_the_interval_of_the_differences() -> None:
    before, after = normals(400) + 3.0, normals(400, seed=1) + 2.5
    comparison = paired_comparison(before, after)
    difference = (after - before).numpy()
    expected = scipy_bootstrap((difference,), np.mean, method="percentile", rng=0).confidence_interval
    assert comparison.mean == pytest.approx(difference.mean())
    # A twelfth of the interval's width: 1,000 resamples leave its ends uncertain by about a thirtieth each.
    tolerance = (expected.high - expected.low) / 12
    assert (comparison.low, comparison.high) == pytest.approx((expected.low, expected.high), abs=tolerance)


def test_the_interval_covers_the_true_change_nineteen_times_in_twenty() -> None:
    differences = normals(300, 100) - 0.3
    intervals = [paired_comparison(torch.zeros(100), row) for row in differences]
    covered = sum(interval.low < -0.3 < interval.high for interval in intervals) / 300
    assert covered == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize(("change", "lower"), [(-0.5, True), (0.0, False), (0.5, False)])
def test_only_a_fall_beyond_chance_is_significant(change: float, lower: bool) -> None:
    before, noise = normals(200), normals(200, seed=1)
    noise = noise - noise.mean()
    assert paired_comparison(before, before + noise + change).significantly_lower is lower


def test_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted: 2 or more"):
        paired_comparison(torch.zeros(1), torch.ones(1))


def test_evaluation_compares_tuned_with_untuned_from_the_same_noise() -> None:
    teacher, reference, timesteps = normals(64, 2), normals(80, 2, seed=1), torch.tensor([1.0, 0.5, 0.1])

    def sample(timesteps: Tensor, t_ratios: Tensor | None) -> Tensor:
        """Off by 1 untuned, and by 1 - t_ratios[0] tuned."""
        return teacher + torch.tensor([1.0 if t_ratios is None else 1.0 - float(t_ratios[0]), 0.0])

    good = evaluate(sample, timesteps, torch.tensor([0.75, 1.0]), teacher, reference)
    assert (good.teacher_l2_before, good.teacher_l2_after, good.score) == pytest.approx((1.0, 0.25, 0.25))
    assert good.better
    assert good.frechet_before == pytest.approx(frechet_distance(teacher + torch.tensor([1.0, 0.0]), reference))
    assert good.frechet_after == pytest.approx(frechet_distance(teacher + torch.tensor([0.25, 0.0]), reference))
    worse = evaluate(sample, timesteps, torch.tensor([-1.0, 1.0]), teacher, None)
    assert not worse.better
    assert (worse.score, worse.frechet_after) == pytest.approx((2.0, 4.0))


def test_evaluation_measures_features_and_mixtures_if_told_of_them() -> None:
    mixture = small_mixture()
    teacher, _ = mixture.sample(60, torch.Generator().manual_seed(0))

    def sample(timesteps: Tensor, t_ratios: Tensor | None) -> Tensor:
        return teacher * (0.5 if t_ratios is None else 0.9)

    evaluation = evaluate(
        sample,
        torch.tensor([1.0, 0.1]),
        torch.tensor([0.9]),
        teacher,
        teacher,
        features=lambda x: x[:, :1],
        mixture=mixture,
        kl=lambda _, t_ratios: torch.full((60,), 2.0 if t_ratios is None else 1.0),
    )
    assert set(evaluation.metrics) == {*ALL_METRICS}
    assert all(metric.change.significantly_lower for metric in evaluation.metrics.values())
    assert (evaluation.metrics["kl"].before, evaluation.metrics["kl"].after) == (2.0, 1.0)
    assert evaluation.metrics["frechet_features"].before == pytest.approx(
        frechet_distance(0.5 * teacher[:, :1], teacher[:, :1])
    )


def test_a_sampler_already_at_the_teacher_scores_one() -> None:
    teacher = normals(8, 2)
    evaluation = evaluate(lambda *_: teacher, torch.tensor([1.0, 0.1]), torch.tensor([1.0]), teacher, None)
    assert evaluation.score == 1.0
    assert not evaluation.better
    assert all(math.isfinite(value) for value in dataclasses.astuple(evaluation.change))


FELL, FELL_PERHAPS, ROSE_PERHAPS, ROSE = (-0.3, -0.1), (-0.3, 0.1), (-0.1, 0.3), (0.1, 0.3)
ROSE_HARDLY = (-0.03, 0.04)


def evaluation_of(adds_noise: bool, **intervals: tuple[float, float]) -> Evaluation:
    metrics = {}
    for name, (low, high) in intervals.items():
        change = PairedComparison((low + high) / 2, low, high)
        metrics[name] = Metric(name, 1.0, 1.0 + change.mean, change)
    return Evaluation(metrics, adds_noise)


@pytest.mark.parametrize(
    ("adds_noise", "intervals", "verdict", "reason"),
    [
        (False, {"teacher_l2": FELL, "frechet": FELL_PERHAPS}, "accepted", "fell: teacher_l2"),
        (False, {"teacher_l2": FELL}, "accepted", "fell: teacher_l2"),
        (False, {"teacher_l2": FELL, "frechet": ROSE_HARDLY}, "accepted", "fell: teacher_l2"),
        (
            False,
            {"teacher_l2": FELL_PERHAPS, "frechet": FELL},
            "undecided",
            "did not fall beyond chance: teacher_l2",
        ),
        (
            False,
            {"teacher_l2": (0.0, 0.0), "frechet": (0.0, 0.0)},
            "undecided",
            "did not fall beyond chance: teacher_l2",
        ),
        (False, {"teacher_l2": ROSE}, "rejected", "rose: teacher_l2"),
        (False, {"teacher_l2": FELL, "frechet": ROSE_PERHAPS}, "undecided", "may have risen: frechet"),
        (False, {"teacher_l2": FELL, "frechet": ROSE}, "rejected", "rose: frechet"),
        (
            False,
            {"teacher_l2": FELL, "frechet": FELL, "frechet_features": ROSE_PERHAPS},
            "undecided",
            "may have risen: frechet_features",
        ),
        (
            False,
            {"teacher_l2": FELL, "frechet": FELL, "sliced_wasserstein": ROSE_PERHAPS},
            "accepted",
            "fell: teacher_l2",
        ),
        (False, {"teacher_l2": FELL, "frechet": FELL, "frechet_features": ROSE}, "rejected", "rose: frechet_features"),
        (False, {"teacher_l2": FELL, "frechet": FELL, "kl": ROSE}, "rejected", "rose: kl"),
        (False, {"teacher_l2": FELL, "frechet": FELL, "frechet_to_data": ROSE}, "accepted", "fell: teacher_l2"),
        (True, {"teacher_l2": ROSE, "frechet": FELL}, "accepted", "fell: frechet"),
        (True, {"teacher_l2": FELL, "frechet": FELL_PERHAPS}, "undecided", "did not fall beyond chance: frechet"),
        (
            True,
            {"teacher_l2": FELL, "frechet": FELL, "sliced_wasserstein": ROSE},
            "rejected",
            "rose: sliced_wasserstein",
        ),
        (True, {"teacher_l2": ROSE, "sliced_wasserstein": FELL}, "accepted", "fell: sliced_wasserstein"),
    ],
)
def test_a_schedule_is_accepted_if_what_decides_fell_and_nothing_rose(
    adds_noise: bool, intervals: dict[str, tuple[float, float]], verdict: str, reason: str
) -> None:
    evaluation = evaluation_of(adds_noise, **intervals)
    assert evaluation.verdict == verdict
    assert evaluation.better == (verdict == "accepted")
    assert evaluation.reason.startswith(reason + " 1 before")


@pytest.mark.parametrize(
    ("cost", "verdict", "reason"),
    [
        ((-0.04, 0.04), "accepted", "fell: teacher_l2"),
        ((0.01, 0.05), "accepted", "fell: teacher_l2"),
        ((0.01, 0.06), "undecided", "may be worse than in float32: teacher_l2"),
        ((0.06, 0.08), "rejected", "worse than in float32: teacher_l2"),
        ((math.nan, math.nan), "undecided", "may be worse than in float32: teacher_l2"),
    ],
)
def test_a_lesser_precision_is_accepted_if_it_costs_no_more_than_a_margin_of_what_float32_has(
    cost: tuple[float, float], verdict: str, reason: str
) -> None:
    by_precision = evaluation_of(False, teacher_l2=cost).metrics["teacher_l2"]
    evaluation = dataclasses.replace(evaluation_of(False, teacher_l2=FELL), by_precision=by_precision)
    assert evaluation.verdict == verdict
    assert evaluation.reason.startswith(reason)
    rose = dataclasses.replace(evaluation_of(False, teacher_l2=ROSE), by_precision=by_precision)
    assert rose.verdict == "rejected"


def ring_experiment(guidance: Guidance) -> Experiment:
    return Experiment(load_builtin("mixture-ring"), guidance, SAMPLERS["ddim"])


def test_guided_samples_are_compared_with_the_teachers_and_the_data_are_information() -> None:
    """Ten steps are nearer to the teacher than five, while guidance takes both away from the data."""
    guided = ring_experiment(Guidance("classifier-free", 7.5))
    schedule = guided.model.noise_schedule
    grid, few = make_timesteps(schedule, 10, "quadratic"), make_timesteps(schedule, 10)
    evaluation = guided.evaluate(grid, torch.ones(10, dtype=torch.float64), 512)
    teacher = guided.teach(guided.seeds(512, EVALUATION_SEEDS), guided.conditions(512, EVALUATION_SEEDS), 100)
    tuned, untuned = (
        guided.sample(guided.seeds(512, EVALUATION_SEEDS), guided.conditions(512, EVALUATION_SEEDS), timesteps)
        for timesteps in (grid, few)
    )
    frechet, to_data = evaluation.metrics["frechet"], evaluation.metrics["frechet_to_data"]
    assert frechet.before == pytest.approx(frechet_distance(untuned, teacher))
    assert frechet.after == pytest.approx(frechet_distance(tuned, teacher))
    assert guided.model.reference is not None
    assert to_data.after == pytest.approx(frechet_distance(tuned, guided.model.reference))
    assert to_data.teacher == pytest.approx(frechet_distance(teacher, guided.model.reference))
    unguided = ring_experiment(Guidance("uncond", 1.0)).evaluate(grid, torch.ones(10, dtype=torch.float64), 64)
    assert "frechet_to_data" not in unguided.metrics


@pytest.mark.parametrize(
    ("inner", "num_samples", "verdict"),
    [(None, 64, "undecided"), ([0.6, 0.3, 0.1, 0.03], 16, "accepted"), ([0.99, 0.98, 0.97, 0.96], 16, "rejected")],
)
def test_an_undecided_evaluation_takes_more_noises_up_to_its_bound(
    inner: list[float] | None, num_samples: int, verdict: str
) -> None:
    experiment = ring_experiment(Guidance("uncond", 1.0))
    grid = make_timesteps(experiment.model.noise_schedule, 5)
    if inner is not None:
        grid[1:-1] = torch.tensor(inner, dtype=torch.float64)
    t_ratios = torch.ones(5, dtype=torch.float64)
    evaluation = experiment.evaluate(grid, t_ratios, 16, 20, max_num_samples=64)
    assert (evaluation.verdict, evaluation.num_samples) == (verdict, num_samples)
    at_once = experiment.evaluate(grid, t_ratios, num_samples, 20)
    for name, metric in at_once.metrics.items():
        found = evaluation.metrics[name]
        assert (found.before, found.after) == pytest.approx((metric.before, metric.after))


def test_samples_that_are_not_finite_are_worse_and_still_go_into_json() -> None:
    teacher = normals(16, 2)

    def sample(timesteps: Tensor, t_ratios: Tensor | None) -> Tensor:
        return teacher + (1.0 if t_ratios is None else math.nan)

    evaluation = evaluate(sample, torch.tensor([1.0, 0.1]), torch.tensor([0.9]), teacher, None)
    assert not evaluation.better
    figures = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert (figures["verdict"], figures["better"], figures["score"]) == ("rejected", False, None)
    assert figures["metrics"]["teacher_l2"]["before"] == pytest.approx(math.sqrt(2))
    assert figures["metrics"]["teacher_l2"]["after"] is None


# The reference and the two samplers of it that the intervals below are of: one too narrow, one less so.
REFERENCE = normals(400, 3, seed=99)
MEASURES: dict[str, Measure] = {
    "frechet": Frechet.to(REFERENCE),
    "sliced_wasserstein": SlicedWasserstein.to(REFERENCE, num_projections=16),
    "wasserstein": partial(wasserstein_estimate, REFERENCE),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_distances_interval_covers_the_change_to_be_expected(name: str) -> None:
    x = normals(120, 100, 3)
    changes = [bootstrap(MEASURES[name](0.6 * z), MEASURES[name](0.8 * z + 0.1)) for z in x]
    expected = sum(change.mean for change in changes) / len(changes)
    covered = sum(change.low < expected < change.high for change in changes) / len(changes)
    assert expected < 0
    assert 0.88 <= covered < 1.0


@pytest.mark.parametrize("name", ["frechet", "sliced_wasserstein"])
def test_a_samples_influence_is_what_leaving_it_out_changes(name: str) -> None:
    x = 0.8 * normals(200, 3) + 0.1
    measure = MEASURES[name]
    value, influence = measure(x)
    left_out = torch.tensor([measure(torch.cat([x[:i], x[i + 1 :]])).value for i in range(200)])
    jackknife = 199 * (left_out.mean() - left_out)
    assert value == pytest.approx(float(left_out.mean()), rel=0.01)
    assert float((influence - jackknife).square().mean() / influence.square().mean()) < 0.03


def test_sliced_wasserstein_distance_of_shifted_gaussians_is_the_closed_form() -> None:
    """`|shift| / sqrt(D)` between N(0, I) and N(shift, I)."""
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0])
    a, b = normals(2000, 4), normals(1500, 4, seed=1) + shift
    measure = SlicedWasserstein.to(b, num_projections=500)
    assert measure(a).value == pytest.approx(float(shift.norm()) / 2, rel=0.05)


def test_sliced_wasserstein_distance_takes_sets_of_any_size() -> None:
    a, b = normals(50, 3), 2 * normals(50, 3, seed=1)
    assert sliced_wasserstein(a, b.repeat(2, 1)) == pytest.approx(sliced_wasserstein(a, b))
    assert sliced_wasserstein(a.repeat(3, 1), b) == pytest.approx(sliced_wasserstein(a, b), rel=0.02)
    assert sliced_wasserstein(a, a) == pytest.approx(0, abs=1e-12)


def test_wasserstein_distance_is_that_of_the_best_of_all_pairings() -> None:
    a, b = normals(6, 2, 2), normals(6, 2, 2, seed=1)
    squared = [float((a - b[list(order)]).square().sum() / 6) for order in itertools.permutations(range(6))]
    assert wasserstein(a, b) == pytest.approx(math.sqrt(min(squared)))


def test_wasserstein_distance_of_shifted_sets_is_the_shift() -> None:
    a = normals(300, 2)
    shift = torch.tensor([0.3, 0.4])
    assert wasserstein(a, a.flip(0) + shift) == pytest.approx(0.5)
    assert wasserstein_estimate(a.flip(0) + shift, a).influence.shape == (300,)


def gaussian(std: float, *mean: float) -> GaussianMixture:
    return GaussianMixture(
        NoiseScheduleVP("linear"),
        means=torch.tensor([mean], dtype=torch.float64),
        stds=torch.tensor([std], dtype=torch.float64),
        weights=torch.ones(1, dtype=torch.float64),
        classes=torch.zeros(1, dtype=torch.int64),
    )


def check_kl(run: Callable[[Tensor], Tensor], mixture: GaussianMixture, std: float = 1.0) -> None:
    """The KL divergence of an affine map of normal noise, against the closed form of two Gaussians."""
    x_T = std * normals(4000, 2)
    shift, *columns = run(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    matrix = torch.stack([column - shift for column in columns], dim=1)
    q = MultivariateNormal(shift, std**2 * matrix @ matrix.T)
    p = MultivariateNormal(mixture.means[0], mixture.stds[0] ** 2 * torch.eye(2, dtype=torch.float64))
    terms = sampler_kl(run, x_T, mixture, std=std)
    x0 = run(x_T)
    torch.testing.assert_close(terms, q.log_prob(x0) - p.log_prob(x0))
    error = 5 * float(terms.std()) / math.sqrt(len(terms))
    assert float(terms.mean()) == pytest.approx(float(kl_divergence(q, p)), abs=error)


@pytest.mark.parametrize("std", [1.0, 3.0])
def test_kl_of_an_affine_map_of_the_noise_is_that_of_two_gaussians(std: float) -> None:
    matrix = torch.tensor([[0.3, 0.1], [-0.2, -0.4]], dtype=torch.float64)
    check_kl(lambda x: x @ matrix.T + 0.2, gaussian(0.5, 0.3, -0.1), std)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_kl_of_a_sampler_of_one_gaussian_which_is_affine(sampler: str) -> None:
    mixture = gaussian(0.5, 0.3, -0.1)
    step_fn = get_sampler(sampler).step_fn(model_wrapper(mixture, mixture.noise_schedule), mixture.noise_schedule)
    timesteps = make_timesteps(mixture.noise_schedule, 4)
    t_ratios = torch.tensor([0.9, 0.95, 0.9, 1.0])
    check_kl(lambda x: sampled(step_fn, x, timesteps, t_ratios), mixture)


@pytest.mark.parametrize(
    ("distance", "num_steps", "is_beyond"),
    [(1.0, 5.0, False), (0.5, 10.0, False), (2**-0.5, 5 * 2**0.5, False), (0.1, None, True), (1.5, None, False)],
)
def test_a_schedule_is_worth_the_untuned_steps_that_come_as_near(
    distance: float, num_steps: float | None, is_beyond: bool
) -> None:
    """The error of a first-order sampler halves with twice the steps, so that the line in logarithms is exact."""
    worth = Worth(distance, UntunedCurve("uniform", {steps: 5 / steps for steps in (5, 8, 10, 20)}, 16))
    assert worth.num_steps == (None if num_steps is None else pytest.approx(num_steps))
    assert worth.is_beyond == is_beyond


def test_worth_is_by_the_distances_of_plain_samples_from_the_best_named_grid() -> None:
    experiment = ring_experiment(Guidance("uncond", 1.0))
    schedule = experiment.model.noise_schedule
    grid = make_timesteps(schedule, 9, "log_snr")[[0, 2, 4, 6, 8, 9]]
    evaluation = experiment.evaluate(grid, torch.ones(5, dtype=torch.float64), 150, 40, measures_worth=True)
    worth = evaluation.worth
    assert worth is not None
    assert worth.curve.num_samples == MAX_WORTH_SAMPLES
    seeds = experiment.seeds(MAX_WORTH_SAMPLES, EVALUATION_SEEDS)
    teacher = experiment.teach(seeds, None, 40)

    def distance(timesteps: Tensor) -> float:
        return float(teacher_l2(experiment.sample(seeds, None, timesteps), teacher).mean())

    by_grid = {name: distance(make_timesteps(schedule, 5, name)) for name in get_args(NamedGrid)}
    grid_name = worth.curve.grid
    assert by_grid[grid_name] == min(by_grid.values())
    expected = {steps: distance(make_timesteps(schedule, steps, grid_name)) for steps in (5, 8, 10, 15, 20)}
    assert worth.curve.untuned == pytest.approx(expected, rel=1e-4)
    assert worth.teacher_l2 == pytest.approx(distance(grid), rel=1e-4)
    assert experiment.evaluate(grid, torch.ones(5, dtype=torch.float64), 16, 40).worth is None
    # No more untuned steps are taken than say something: the teacher's own are none.
    few = experiment.evaluate(grid, torch.ones(5, dtype=torch.float64), 16, 12, measures_worth=True).worth
    assert few is not None
    assert list(few.curve.untuned) == [5, 8, 10]


def test_a_schedule_has_to_be_nearer_to_the_teacher_than_the_best_named_grid() -> None:
    """A grid between the default one and the best named one is better than untuned by default, and worse than that."""
    experiment = ring_experiment(Guidance("uncond", 1.0))
    schedule = experiment.model.noise_schedule
    default, ones = make_timesteps(schedule, 5), torch.ones(5, dtype=torch.float64)
    curve = experiment.evaluate(default, ones, 64, 20, measures_worth=True).worth
    assert curve is not None
    best = make_timesteps(schedule, 5, curve.curve.grid)
    between = experiment.evaluate((3 * default + best) / 4, ones, 64, 20, measures_worth=True)
    assert between.change.significantly_lower
    assert between.best_untuned is not None
    assert between.best_untuned.teacher_l2 == pytest.approx(
        experiment.evaluate(best, ones, 64, 20).teacher_l2_after, rel=1e-6
    )
    assert between.best_untuned.change.mean == pytest.approx(
        between.teacher_l2_after - between.best_untuned.teacher_l2, rel=1e-6
    )
    assert between.verdict == "rejected"
    assert between.reason.startswith(f"farther from the teacher than untuned ddim on the grid {curve.curve.grid}")
    itself = experiment.evaluate(best, ones, 64, 20, measures_worth=True)
    assert itself.verdict == "undecided"
    assert itself.reason.startswith("not nearer to the teacher, beyond chance, than untuned ddim on the grid")


def test_a_known_curve_is_not_measured_again_and_all_calls_are_counted() -> None:
    """The verdict and the worth are the same, and the calls are those that `evaluation_calls` and its kin say."""
    calls = 0

    def count(_: int) -> None:
        nonlocal calls
        calls += 1

    model = load_builtin("mixture-ring").watched(count)
    experiment = Experiment(model, Guidance("classifier-free", 2.0), SAMPLERS["ddim"], rows_at_once=16)
    grid = make_timesteps(model.noise_schedule, 9, "log_snr")[[0, 2, 4, 6, 8, 9]]
    ones, measured = torch.ones(5, dtype=torch.float64), dict[float, UntunedCurve]()
    first = experiment.evaluate(grid, ones, 150, 40, measures_worth=True, on_curve=measured.__setitem__)
    assert list(measured) == [2.0]
    curve = measured[2.0]
    expected = experiment.evaluation_calls(5, 40, 0, 150) + experiment.curve_calls(5, 40, 150)
    assert calls == expected + experiment.rest_of_rival_calls(5, 150, curve)
    before, calls = calls, 0
    kept = {2.0: UntunedCurve.from_dict(json.loads(json.dumps(curve.to_dict())))}
    again = experiment.evaluate(grid, ones, 150, 40, measures_worth=True, curves=kept, on_curve=measured.pop)
    assert again == first
    assert calls == experiment.evaluation_calls(5, 40, 0, 150, curve) < 0.9 * before
