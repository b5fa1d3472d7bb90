"""The verdict on a schedule: each metric before and after tuning, with an interval for the change."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from timetuner_core.evaluation.distances import (
    Estimate,
    data_measures,
    mean_estimate,
    measure,
)
from timetuner_core.models.mixtures import GaussianMixture

NUM_RESAMPLES = 1000
FRECHET_METRICS = ("frechet", "frechet_features")


@dataclass(frozen=True)
class PairedComparison:
    """Mean of `after - before` over paired samples, and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def significantly_lower(self) -> bool:
        return self.high < 0

    @property
    def significantly_higher(self) -> bool:
        return self.low > 0


def paired_comparison(before: Tensor, after: Tensor) -> PairedComparison:
    """Compare two errors of the same samples, each `(B,)`. Raises: see `bootstrap`."""
    return bootstrap(mean_estimate(before), mean_estimate(after))


def bootstrap(before: Estimate, after: Estimate, *, num_resamples: int = NUM_RESAMPLES) -> PairedComparison:
    """The change of a figure, and the percentile interval of its paired bootstrap (Efron & Tibshirani 1993, ch. 13);
    seeded. Figures that are not finite have an interval without width.

    Raises:
        ValueError: fewer than two samples.
    """
    difference = after.influence - before.influence
    num_samples, change = len(difference), after.value - before.value
    if num_samples < 2:
        raise ValueError(f"{num_samples} sample; accepted: 2 or more")
    if not math.isfinite(change):
        return PairedComparison(change, change, change)
    generator = torch.Generator().manual_seed(0)
    difference = difference.cpu()
    rows = [
        difference[torch.randint(num_samples, (100, num_samples), generator=generator)].mean(dim=1)
        for _ in range(num_resamples // 100)
    ]
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (change + torch.quantile(torch.cat(rows), tails)).tolist()
    return PairedComparison(change, low, high)


@dataclass(frozen=True)
class Metric:
    """A figure that is the better the lower, of the untuned and of the tuned sampler.

    Attributes:
        stock: that of the grid which diffusers takes by default, untuned; None if it was not measured.
    """

    name: str
    before: float
    after: float
    change: PairedComparison
    stock: float | None = None

    def __str__(self) -> str:
        interval = f"95 % interval of the change {self.change.low:.3g} to {self.change.high:.3g}"
        return f"{self.name} {self.before:.4g} before, {self.after:.4g} after ({interval})"


@dataclass(frozen=True)
class Evaluation:
    """A tuned schedule against its untuned twin, from the same noise.

    Attributes:
        metrics: by name: `teacher_l2`, `sliced_wasserstein`, and, where they could be measured, `frechet`,
            `frechet_features`, `wasserstein`, `kl`.
        adds_noise: whether the sampler does. Then no sample of it is meant to be the teacher's, and the distance
            of distributions decides: the first of `frechet`, `frechet_features` and `sliced_wasserstein`.
    """

    metrics: Mapping[str, Metric]
    adds_noise: bool = False

    @property
    def teacher_l2_before(self) -> float:
        return self.metrics["teacher_l2"].before

    @property
    def teacher_l2_after(self) -> float:
        return self.metrics["teacher_l2"].after

    @property
    def change(self) -> PairedComparison:
        """The change of teacher L2."""
        return self.metrics["teacher_l2"].change

    @property
    def frechet_before(self) -> float | None:
        return self.metrics["frechet"].before if "frechet" in self.metrics else None

    @property
    def frechet_after(self) -> float | None:
        return self.metrics["frechet"].after if "frechet" in self.metrics else None

    @property
    def deciding(self) -> Metric:
        """The metric that has to fall."""
        names = (*FRECHET_METRICS, "sliced_wasserstein") if self.adds_noise else ("teacher_l2",)
        return next(self.metrics[name] for name in names if name in self.metrics)

    @property
    def score(self) -> float:
        """The deciding metric, tuned over untuned."""
        return self.deciding.after / self.deciding.before if self.deciding.before > 0 else 1.0

    @property
    def better(self) -> bool:
        """Whether tuning helped beyond chance, and harmed nothing.

        The deciding metric's interval is below 0, the Fréchet distances are not up at all, and no other metric's
        interval is above 0. Nor is the distance to the data above that of diffusers' own time grid.
        """
        return self._objection is None

    @property
    def reason(self) -> str:
        """Why it is better, or is not: the metric that says so, and its figures."""
        return f"fell: {self.deciding}" if self._objection is None else self._objection

    @property
    def _objection(self) -> str | None:
        deciding = self.deciding
        if not deciding.change.significantly_lower:
            return f"did not fall beyond chance: {deciding}"
        for metric in self.metrics.values():
            if metric.name == "teacher_l2" and self.adds_noise:
                continue
            is_frechet = metric.name in FRECHET_METRICS
            if metric.change.significantly_higher or (is_frechet and metric.change.mean > 0):
                return f"rose: {metric}"
        return self._worse_than_stock()

    def _worse_than_stock(self) -> str | None:
        names = [name for name in FRECHET_METRICS if name in self.metrics] or ["sliced_wasserstein"]
        for metric in map(self.metrics.get, names):
            if metric is not None and metric.stock is not None and metric.after > metric.stock:
                return f"worse than diffusers' own time grid, which has {metric.stock:.4g}: {metric}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON takes; figures that are not finite are None."""
        metrics = {name: _finite(asdict(metric)) for name, metric in self.metrics.items()}
        verdict = {"better": self.better, "reason": self.reason, "score": self.score, "adds_noise": self.adds_noise}
        return _finite(verdict) | {"metrics": metrics}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _finite(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }


def compare(
    before: Mapping[str, Estimate],
    after: Mapping[str, Estimate],
    *,
    stock: Mapping[str, Estimate] | None = None,
    adds_noise: bool = False,
) -> Evaluation:
    """Two samplers' figures, by `measure`, from the same noise in the same order. Raises: see `bootstrap`.

    Args:
        stock: those of diffusers' own time grid; the distance to a teacher is none of them.
    """
    stocks = {name: estimate.value for name, estimate in (stock or {}).items() if name != "teacher_l2"}
    metrics = {
        name: Metric(
            name, before[name].value, after[name].value, bootstrap(before[name], after[name]), stocks.get(name)
        )
        for name in before
    }
    return Evaluation(metrics, adds_noise)


def evaluate(
    sample: Callable[[Tensor, Tensor | None], Tensor],
    timesteps: Tensor,
    t_ratios: Tensor,
    teacher_samples: Tensor,
    reference: Tensor | None,
    *,
    untuned_timesteps: Tensor | None = None,
    stock_timesteps: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    mixture: GaussianMixture | None = None,
    kl: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    adds_noise: bool = False,
) -> Evaluation:
    """Compare `sample(timesteps, t_ratios)` with `sample(untuned_timesteps, None)`, both from the teacher's noise.

    Args:
        untuned_timesteps: the untuned sampler's grid; default the same.
        stock_timesteps: diffusers' own grid, whose samples a better schedule's must not be worse than; None for none.
        teacher_samples: `(B, ...)`. reference: data `(P, ...)`; None compares with the teacher's samples.
        features, mixture: see `data_measures`; a mixture only if its samples are what is asked for, without
            guidance.
        kl: like `sample`, but gives `sampler_kl` of that schedule.
        adds_noise: see `Evaluation`.
    """
    untuned = timesteps if untuned_timesteps is None else untuned_timesteps
    measures = data_measures(teacher_samples if reference is None else reference, features, mixture)

    def figures(timesteps: Tensor, t_ratios: Tensor | None, *, with_kl: bool = True) -> dict[str, Estimate]:
        kl_terms = kl(timesteps, t_ratios) if kl is not None and with_kl else None
        return measure(sample(timesteps, t_ratios), teacher_samples, measures, kl_terms)

    stock = None if stock_timesteps is None else figures(stock_timesteps, None, with_kl=False)
    return compare(figures(untuned, None), figures(timesteps, t_ratios), stock=stock, adds_noise=adds_noise)
