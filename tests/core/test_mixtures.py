"""Closed-form mixtures against torch's distributions and exact moments."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.core.conftest import linear_betas, normals, small_mixture
from timetuner_core import NoiseScheduleVP
from timetuner_core.models.mixtures import GaussianMixture, gratings_mixture, ring_mixture

BUILTINS = [ring_mixture, gratings_mixture]

every_mixture = pytest.mark.parametrize("make_mixture", [small_mixture, *BUILTINS])


def in_float64(mixture: GaussianMixture) -> GaussianMixture:
    floats = (tensor.double() for tensor in (mixture.means, mixture.stds, mixture.weights))
    return GaussianMixture(mixture.noise_schedule, *floats, mixture.classes)


def distribution(mixture: GaussianMixture, t: float, label: int | None = None) -> MixtureSameFamily:
    """p_t(x_t), or p_t(x_t | label), of flattened x_t."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha_t, sigma_t = mixture.noise_schedule.marginal_alpha(time), mixture.noise_schedule.marginal_std(time)
    chosen = mixture.classes == label if label is not None else torch.ones_like(mixture.classes).bool()
    means, stds = mixture.means[chosen].flatten(1), mixture.stds[chosen]
    spread = torch.sqrt((alpha_t * stds) ** 2 + sigma_t**2)[:, None].expand_as(means)
    components = Independent(Normal(alpha_t * means, spread), 1)
    return MixtureSameFamily(Categorical(mixture.weights[chosen]), components)


def model_input(mixture: GaussianMixture, t: float, batch_size: int) -> Tensor:
    return mixture.noise_schedule.model_input_time(torch.full((batch_size,), t, dtype=torch.float64))


@pytest.mark.parametrize("t", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("label", [None, 0, 1])
@every_mixture
def test_eps_is_the_scaled_gradient_of_the_log_density(
    make_mixture: Callable[[], GaussianMixture], label: int | None, t: float
) -> None:
    mixture = in_float64(make_mixture())
    x = normals(6, *mixture.sample_shape).requires_grad_()
    log_density = distribution(mixture, t, label).log_prob(x.flatten(1)).sum()
    (gradient,) = torch.autograd.grad(log_density, x)
    sigma_t = mixture.noise_schedule.marginal_std(torch.tensor(t, dtype=torch.float64))
    condition = None if label is None else torch.full((6,), label)
    eps = mixture(x, model_input(mixture, t, 6), condition)
    torch.testing.assert_close(eps, -sigma_t * gradient, atol=1e-10, rtol=1e-9)


def test_eps_is_that_of_finite_differences_on_a_discrete_schedule() -> None:
    """Training step 3 of 10 is the network's input 2."""
    mixture = small_mixture(NoiseScheduleVP("discrete", betas=linear_betas(10)))
    x, delta = normals(6, 2), 1e-5
    log_density = distribution(mixture, 0.3).log_prob
    shifts = delta * torch.eye(2, dtype=torch.float64)
    differences = torch.stack([log_density(x + shift) - log_density(x - shift) for shift in shifts], dim=1)
    sigma_t = mixture.noise_schedule.marginal_std(torch.tensor(0.3, dtype=torch.float64))
    expected = -sigma_t * differences / (2 * delta)
    torch.testing.assert_close(mixture(x, torch.full((6,), 2.0, dtype=torch.float64)), expected, atol=1e-8, rtol=0)


@every_mixture
def test_the_null_label_means_the_whole_mixture(make_mixture: Callable[[], GaussianMixture]) -> None:
    mixture = in_float64(make_mixture())
    x, t_input = normals(6, *mixture.sample_shape), model_input(mixture, 0.3, 6)
    null = torch.full((6,), mixture.null_class_label)
    assert torch.equal(mixture(x, t_input, null), mixture(x, t_input))


@every_mixture
def test_the_class_posterior_is_that_of_bayes_and_sums_to_one(make_mixture: Callable[[], GaussianMixture]) -> None:
    mixture = in_float64(make_mixture())
    x, t_input = normals(6, *mixture.sample_shape), model_input(mixture, 0.3, 6)
    labels = range(mixture.num_classes)
    posterior = torch.stack([mixture.log_class_posterior(x, t_input, torch.full((6,), c)) for c in labels]).exp()
    torch.testing.assert_close(posterior.sum(dim=0), torch.ones(6, dtype=torch.float64), atol=1e-12, rtol=0)
    for label in labels:
        prior = mixture.weights[mixture.classes == label].sum()
        likelihood, evidence = (distribution(mixture, 0.3, given).log_prob(x.flatten(1)) for given in (label, None))
        expected = prior * torch.exp(likelihood - evidence)
        torch.testing.assert_close(posterior[label], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("label", [None, 0, 1])
@every_mixture
def test_the_density_is_that_of_torchs_distributions(
    make_mixture: Callable[[], GaussianMixture], label: int | None
) -> None:
    mixture = in_float64(make_mixture())
    x0 = mixture.sample(6, torch.Generator().manual_seed(0))[0].double()
    condition = None if label is None else torch.full((6,), label)
    expected = distribution(mixture, 0.0, label).log_prob(x0.flatten(1))
    torch.testing.assert_close(mixture.log_density(x0, condition), expected)


@every_mixture
def test_the_density_of_the_null_label_is_the_whole_mixtures(make_mixture: Callable[[], GaussianMixture]) -> None:
    mixture = make_mixture()
    x0, labels = mixture.sample(6, torch.Generator().manual_seed(0))
    some = torch.where(torch.arange(6) < 3, mixture.null_class_label, labels)
    expected = torch.cat([mixture.log_density(x0)[:3], mixture.log_density(x0, labels)[3:]])
    torch.testing.assert_close(mixture.log_density(x0, some), expected)


@every_mixture
def test_samples_have_the_exact_moments_and_class_frequencies(make_mixture: Callable[[], GaussianMixture]) -> None:
    mixture, num_samples = in_float64(make_mixture()), 20_000
    x0, labels = mixture.sample(num_samples, torch.Generator().manual_seed(0))
    assert x0.shape == (num_samples, *mixture.sample_shape)
    means = mixture.means.flatten(1)
    mean = mixture.weights @ means
    variance = mixture.weights @ ((means - mean) ** 2 + mixture.stds[:, None] ** 2)
    deviations = x0.flatten(1).double() - mean
    # Five standard errors: the gratings have 64 pixels to go wrong in.
    mean_error = 5 * torch.sqrt(variance / num_samples)
    variance_error = 5 * deviations.square().std(dim=0) / math.sqrt(num_samples)
    assert bool((deviations.mean(dim=0).abs() < mean_error).all())
    assert bool(((deviations.square().mean(dim=0) - variance).abs() < variance_error).all())
    for label in range(mixture.num_classes):
        prior = float(mixture.weights[mixture.classes == label].sum())
        error = 5 * math.sqrt(prior * (1 - prior) / num_samples)
        assert float((labels == label).double().mean()) == pytest.approx(prior, abs=error)


def test_a_samples_label_is_the_class_of_its_component() -> None:
    mixture = ring_mixture()
    x0, labels = mixture.sample(1000, torch.Generator().manual_seed(0))
    nearest = torch.cdist(x0, mixture.means).argmin(dim=1)
    # Neighbours are 0.61 apart, three standard deviations from the border between them.
    assert float((mixture.classes[nearest] == labels).double().mean()) > 0.99


def test_the_generator_fixes_the_samples() -> None:
    first, again, other = (ring_mixture().sample(5, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("make_mixture", BUILTINS)
def test_float32_keeps_six_digits_or_so(make_mixture: Callable[[], GaussianMixture], t: float) -> None:
    mixture = make_mixture()
    x0, _ = mixture.sample(64, torch.Generator().manual_seed(0))
    time = torch.tensor(t, dtype=torch.float64)
    alpha_t, sigma_t = mixture.noise_schedule.marginal_alpha(time), mixture.noise_schedule.marginal_std(time)
    x_t = (alpha_t * x0 + sigma_t * normals(*x0.shape)).float()
    single = mixture(x_t, torch.full((64,), t))
    double = in_float64(mixture)(x_t.double(), torch.full((64,), t, dtype=torch.float32).double())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("make_mixture", "shape"), [(ring_mixture, (2,)), (gratings_mixture, (1, 8, 8))])
def test_the_builtin_mixtures_have_four_classes_of_two_components(
    make_mixture: Callable[[], GaussianMixture], shape: tuple[int, ...]
) -> None:
    mixture = make_mixture()
    assert (mixture.sample_shape, mixture.num_classes, mixture.null_class_label) == (shape, 4, 4)
    assert torch.bincount(mixture.classes).tolist() == [2, 2, 2, 2]
    assert float(mixture.means.abs().max()) <= 1.0
