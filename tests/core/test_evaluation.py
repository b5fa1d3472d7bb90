"""Measures of a sampler against closed forms, scipy and simulation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import bootstrap as scipy_bootstrap
from torch import Tensor

from tests.core.conftest import normals
from timetuner_core.evaluation import (
    MAX_FRECHET_DIMENSION,
    evaluate,
    frechet_distance,
    paired_comparison,
    teacher_l2,
)


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
    # Between N(0, I) and N(shift, diag(stds^2)): |shift|^2 + sum (1 - std)^2.
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
    differences = normals(1000, 100) - 0.3
    intervals = [paired_comparison(torch.zeros(100), row) for row in differences]
    covered = sum(interval.low < -0.3 < interval.high for interval in intervals) / 1000
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 1000))


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


def test_a_sampler_already_at_the_teacher_scores_one() -> None:
    teacher = normals(8, 2)
    evaluation = evaluate(lambda *_: teacher, torch.tensor([1.0, 0.1]), torch.tensor([1.0]), teacher, None)
    assert evaluation.score == 1.0
    assert not evaluation.better
    assert all(math.isfinite(value) for value in dataclasses.astuple(evaluation.change))
