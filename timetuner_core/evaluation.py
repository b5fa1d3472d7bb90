"""How good a few-step sampler is: distance to a many-step teacher and to the data."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FRECHET_DIMENSION = 4096


def teacher_l2(samples: Tensor, teacher_samples: Tensor) -> Tensor:
    """Each sample's Euclidean distance to the teacher's from the same noise, `(B,)`."""
    distance: Tensor = torch.linalg.vector_norm((samples - teacher_samples).flatten(1).double(), dim=1)
    return distance


def frechet_distance(samples: Tensor, reference: Tensor) -> float | None:
    """The Fréchet distance of Gaussians fitted to two sets `(B, ...)`, in their own (pixel) space.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).
    None for samples of more than `MAX_FRECHET_DIMENSION` values, whose covariance is out of reach.
    """
    a, b = samples.flatten(1).double(), reference.flatten(1).double()
    if a.shape[1] > MAX_FRECHET_DIMENSION:
        return None
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    cov_a, cov_b = (x.T.cov().reshape(x.shape[1], x.shape[1]) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), and the latter is symmetric.
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


@dataclass(frozen=True)
class PairedComparison:
    """Mean of `after - before` over paired samples, and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def significantly_lower(self) -> bool:
        return self.high < 0


def paired_comparison(before: Tensor, after: Tensor) -> PairedComparison:
    """Compare two errors of the same samples, each `(B,)`, by the normal interval of their differences.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(before) < 2:
        raise ValueError(f"{len(before)} sample; accepted: 2 or more")
    difference = (after - before).double()
    mean = float(difference.mean())
    half = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return PairedComparison(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Evaluation:
    """A tuned schedule against its untuned twin, from the same noise.

    Attributes:
        teacher_l2_before, teacher_l2_after: mean `teacher_l2`, untuned and tuned; change: paired.
        frechet_before, frechet_after: `frechet_distance` to the reference, untuned and tuned.
    """

    teacher_l2_before: float
    teacher_l2_after: float
    change: PairedComparison
    frechet_before: float | None
    frechet_after: float | None

    @property
    def better(self) -> bool:
        """Whether tuning brought the samples significantly closer to the teacher's."""
        return self.change.significantly_lower

    @property
    def score(self) -> float:
        """Distance to the teacher, tuned over untuned."""
        return self.teacher_l2_after / self.teacher_l2_before if self.teacher_l2_before > 0 else 1.0


def evaluate(
    sample: Callable[[Tensor, Tensor | None], Tensor],
    timesteps: Tensor,
    t_ratios: Tensor,
    teacher_samples: Tensor,
    reference: Tensor | None,
    *,
    untuned_timesteps: Tensor | None = None,
) -> Evaluation:
    """Compare `sample(timesteps, t_ratios)` with `sample(untuned_timesteps, None)`, both from the teacher's noise.

    Args:
        untuned_timesteps: the untuned sampler's grid; default the same.
        teacher_samples: `(B, ...)`. reference: data `(P, ...)`; None compares with the teacher's samples.
    """
    before = sample(timesteps if untuned_timesteps is None else untuned_timesteps, None)
    after = sample(timesteps, t_ratios)
    l2_before, l2_after = teacher_l2(before, teacher_samples), teacher_l2(after, teacher_samples)
    reference = teacher_samples if reference is None else reference
    return Evaluation(
        teacher_l2_before=float(l2_before.mean()),
        teacher_l2_after=float(l2_after.mean()),
        change=paired_comparison(l2_before, l2_after),
        frechet_before=frechet_distance(before, reference),
        frechet_after=frechet_distance(after, reference),
    )
