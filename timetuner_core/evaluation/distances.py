"""Distances between samples and a teacher's, between distributions, and a sampler's KL divergence."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from timetuner_core.models.mixtures import GaussianMixture

MAX_FRECHET_DIMENSION = 4096
MAX_WASSERSTEIN_SAMPLES = 1000  # The assignment's cost grows with their cube.
MAX_WASSERSTEIN_DIMENSION = 8  # See `wasserstein_estimate`.
NUM_PROJECTIONS = 128


class Estimate(NamedTuple):
    """A figure of a set of samples `(B, ...)`, and how much each sample adds to it, `(B,)`, of mean 0: over samples
    drawn again, the figure is `value + influence.mean()` to first order."""

    value: float
    influence: Tensor


Measure = Callable[[Tensor], Estimate]


def teacher_l2(samples: Tensor, teacher_samples: Tensor) -> Tensor:
    """Each sample's Euclidean distance to the teacher's from the same noise, `(B,)`."""
    distance: Tensor = torch.linalg.vector_norm((samples - teacher_samples).flatten(1).double(), dim=1)
    return distance


def mean_estimate(terms: Tensor) -> Estimate:
    """The mean of `(B,)`."""
    mean = terms.double().mean()
    return Estimate(float(mean), terms.double() - mean)


@dataclass(frozen=True)
class Frechet:
    """The Fréchet distance of Gaussians fitted to samples and to a reference, in their own space.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    Attributes:
        mean `(D,)`, root `(D, D)`: of the reference: m2 and C2^(1/2).
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def to(cls, reference: Tensor) -> "Frechet":
        """The distance to a reference `(P, ...)`."""
        x = reference.flatten(1).double()
        values, vectors = torch.linalg.eigh(x.T.cov().reshape(x.shape[1], x.shape[1]))
        return cls(x.mean(dim=0), vectors * values.clamp(min=0).sqrt() @ vectors.T)

    def __call__(self, samples: Tensor) -> Estimate:
        x = samples.flatten(1).double()
        shift, centred = x.mean(dim=0) - self.mean, x - x.mean(dim=0)
        # tr (C1 C2)^(1/2) is the sum of the singular values of this, and its rows' share in them the derivative
        # by C1: no power of a singular covariance to take.
        left, singular, _ = torch.linalg.svd(centred @ self.root / math.sqrt(len(x) - 1), full_matrices=False)
        own_trace = centred.square().sum() / (len(x) - 1)
        value = shift.square().sum() + own_trace + self.root.square().sum() - 2 * singular.sum()
        share = (len(x) - 1) * left.square() @ singular
        influence = 2 * centred @ shift + centred.square().sum(dim=1) - share
        return Estimate(float(value), influence - influence.mean())


def frechet_distance(samples: Tensor, reference: Tensor) -> float | None:
    """See `Frechet`; None for samples of more than `MAX_FRECHET_DIMENSION` values, whose covariance is out of
    reach. Shapes: `(B, ...)` and `(P, ...)`."""
    if samples[0].numel() > MAX_FRECHET_DIMENSION:
        return None
    return Frechet.to(reference)(samples).value


@dataclass(frozen=True)
class SlicedWasserstein:
    """The sliced 2-Wasserstein distance to a reference (Bonneel et al. 2015): the root mean square, over fixed
    random directions, of the distance between the two sets' projections.

    Attributes:
        directions: `(D, S)`, unit columns. quantiles: `(P, S)`, the reference's projections, each sorted.
    """

    directions: Tensor
    quantiles: Tensor

    @classmethod
    def to(cls, reference: Tensor, num_projections: int = NUM_PROJECTIONS, seed: int = 0) -> "SlicedWasserstein":
        """The distance to a reference `(P, ...)`."""
        x = reference.flatten(1).double()
        shape = (x.shape[1], num_projections)
        normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        directions = (normal / normal.norm(dim=0)).to(x.device)
        return cls(directions, (x @ directions).sort(dim=0).values)

    def __call__(self, samples: Tensor) -> Estimate:
        projected, order = (samples.flatten(1).double() @ self.directions).sort(dim=0)
        displacement = projected - self._at_levels(len(samples))
        squared = displacement.square().mean()
        # The potential is what mass at a point costs. In one dimension its slope is twice the displacement.
        trapezoids = (displacement[1:] + displacement[:-1]) * projected.diff(dim=0)
        potential = torch.cat([torch.zeros_like(projected[:1]), trapezoids.cumsum(dim=0)])
        influence = torch.empty_like(potential).scatter_(0, order, potential).mean(dim=1)
        return _root(squared, influence)

    def _at_levels(self, num_samples: int) -> Tensor:
        """The reference's quantiles at `(i + 1/2) / num_samples`, between its own by linear interpolation."""
        levels = (torch.arange(num_samples, dtype=torch.float64, device=self.quantiles.device) + 0.5) / num_samples
        last = len(self.quantiles) - 1
        position = (levels * len(self.quantiles) - 0.5).clamp(0, last)
        below = position.floor().long()
        above = (below + 1).clamp(max=last)
        return torch.lerp(self.quantiles[below], self.quantiles[above], (position - below)[:, None])


def sliced_wasserstein(samples: Tensor, reference: Tensor) -> float:
    """See `SlicedWasserstein`. Shapes: `(B, ...)` and `(P, ...)`."""
    return SlicedWasserstein.to(reference)(samples).value


def wasserstein_estimate(draws: Tensor, samples: Tensor) -> Estimate:
    """The 2-Wasserstein distance between two sets, exactly, by optimal assignment; of the first
    `MAX_WASSERSTEIN_SAMPLES`, or as many as both have. Shapes: `(P, ...)` and `(B, ...)`.

    Exact for the sets, not for what they were drawn from: two sets from one distribution are apart too, in high
    dimension by more than a set too narrow is from them (of the 64-d gratings, a thousand exact draws come out at
    1.98, DDIM's samples in five steps at 1.59). So `data_measures` takes it up to `MAX_WASSERSTEIN_DIMENSION` only.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # a second of every start

    size = min(len(samples), len(draws), MAX_WASSERSTEIN_SAMPLES)
    cost = torch.cdist(samples[:size].flatten(1).double(), draws[:size].to(samples.device).flatten(1).double()).square()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    cost = cost[:, torch.from_numpy(columns).to(cost.device)]  # Row i now belongs to column i.
    matched = cost.diagonal()
    return _root(matched.mean(), matched - _column_potential(cost - matched[:, None]))


def wasserstein(samples: Tensor, draws: Tensor) -> float:
    """See `wasserstein_estimate`. Shapes: `(B, ...)` and `(P, ...)`."""
    return wasserstein_estimate(draws, samples).value


def _column_potential(excess: Tensor) -> Tensor:
    """The dual `v` of an optimal assignment along the diagonal: the largest `v <= 0` with
    `v_j <= excess_ij + v_i`, as shortest paths (Bellman & Ford); `(B, B)` to `(B,)`."""
    v = torch.zeros_like(excess[0])
    for _ in range(len(v)):
        shorter = (excess + v[:, None]).amin(dim=0)
        if bool((shorter >= v - 1e-12).all()):
            break
        v = torch.minimum(v, shorter)
    return v


def _root(squared: Tensor, influence: Tensor) -> Estimate:
    """The root of a squared distance, from that and its influence."""
    value = float(squared.clamp(min=0).sqrt())
    centred = influence - influence.mean()
    # The root has no derivative at distance 0. A distance that small is rounding.
    return Estimate(value, centred / (2 * value) if value > 1e-9 else torch.zeros_like(centred))


def sampler_kl(
    run: Callable[[Tensor], Tensor],
    x_T: Tensor,
    mixture: GaussianMixture,
    *,
    std: float = 1.0,
    condition: Tensor | None = None,
) -> Tensor:
    """`log q(x0) - log p(x0)` at each sample of a deterministic sampler, `(B,)`; their mean is KL(q | p).

    Both densities are exact, and only the mean over x_T is Monte Carlo: p is the mixture's, and q that of `run`'s
    output by change of variables, `log N(x_T; 0, std^2 I) - log |det dx0 / dx_T|`. That takes `run` to be one to
    one. Where long steps fold space over, q has further parts that this leaves out, and the figure is too low.

    The cost is one run and `D` backward passes over all rows; a few hundred rows will do.

    Args:
        run: `x_T -> x0`, each row by itself, without noise, in float64, differentiable.
        x_T: `(B, *sample_shape)`, normal with standard deviation `std`.
        condition: labels `(B,)` that p is conditioned on; `run` has its own.
    """
    x_T = x_T.detach().double().requires_grad_()
    dimension = x_T[0].numel()
    with torch.enable_grad():
        x0 = run(x_T)
        # The Jacobian is taken row by row in reverse: forward mode would load torch's compiler, which takes seconds.
        rows = [
            torch.autograd.grad(value.sum(), x_T, retain_graph=True)[0].flatten(1)
            for value in x0.flatten(1).unbind(dim=1)
        ]
    x_T, x0 = x_T.detach(), x0.detach()
    log_det = torch.linalg.slogdet(torch.stack(rows, dim=1)).logabsdet
    log_normal = -0.5 * (x_T / std).square().flatten(1).sum(dim=1) - dimension * math.log(math.sqrt(2 * math.pi) * std)
    log_q: Tensor = log_normal - log_det
    return log_q - mixture.log_density(x0, condition)


def data_measures(
    reference: Tensor, features: Callable[[Tensor], Tensor] | None = None, mixture: GaussianMixture | None = None
) -> dict[str, Measure]:
    """Distances to a reference `(P, ...)`, by name; what only depends on the reference is computed here, once.

    Args:
        features: `(B, ...) -> (B, F)`, for a Fréchet distance in their space.
        mixture: what the samples should be drawn from, for the Wasserstein distance to exact draws from it.
    """
    measures: dict[str, Measure] = {}
    if reference[0].numel() <= MAX_FRECHET_DIMENSION:
        measures["frechet"] = Frechet.to(reference)
    if features is not None:
        measures["frechet_features"] = _in_space(features, Frechet.to(features(reference)))
    measures["sliced_wasserstein"] = SlicedWasserstein.to(reference)
    if mixture is not None and math.prod(mixture.sample_shape) <= MAX_WASSERSTEIN_DIMENSION:
        draws, _ = mixture.sample(MAX_WASSERSTEIN_SAMPLES, torch.Generator().manual_seed(1))
        measures["wasserstein"] = partial(wasserstein_estimate, draws)
    return measures


def _in_space(features: Callable[[Tensor], Tensor], measure: Measure) -> Measure:
    return lambda samples: measure(features(samples))


def measure(
    samples: Tensor,
    teacher_samples: Tensor,
    measures: Mapping[str, Measure],
    kl_terms: Tensor | None = None,
) -> dict[str, Estimate]:
    """All figures of samples `(B, ...)`: `teacher_l2`, those of `data_measures`, and `kl` of `sampler_kl`'s terms.
    Infinite where a sample is not finite."""
    if not bool(torch.isfinite(samples).all()):
        names = ["teacher_l2", *measures, *([] if kl_terms is None else ["kl"])]
        return dict.fromkeys(names, Estimate(math.inf, torch.zeros(len(samples), dtype=torch.float64)))
    estimates = {"teacher_l2": mean_estimate(teacher_l2(samples, teacher_samples))}
    estimates |= {name: distance(samples) for name, distance in measures.items()}
    return estimates if kl_terms is None else estimates | {"kl": mean_estimate(kl_terms)}
