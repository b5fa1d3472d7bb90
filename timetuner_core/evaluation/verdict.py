"""The verdict on a schedule: each metric before and after tuning, with an interval for the change."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from timetuner_core.evaluation.distances import (
    MAX_FRECHET_DIMENSION,
    Estimate,
    Frechet,
    data_measures,
    mean_estimate,
    measure,
)
from timetuner_core.evaluation.worth import Worth
from timetuner_core.models.mixtures import GaussianMixture

NUM_RESAMPLES = 1000
FRECHET_METRICS = ("frechet", "frechet_features")
# A Fréchet distance does no harm if its change is, with 95 % confidence, below this share of the untuned one's.
FRECHET_MARGIN = 0.05
# A schedule serves in a lesser precision if its deciding figure is, with 95 % confidence, at most this share above its
# own in float32.
PRECISION_MARGIN = 0.05
# Guided samples are not meant to be distributed as the data, so this figure decides nothing.
FRECHET_TO_DATA = "frechet_to_data"

Verdict = Literal["accepted", "rejected", "undecided"]


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
        teacher: that of the teacher's samples; None if it was not measured.
    """

    name: str
    before: float
    after: float
    change: PairedComparison
    stock: float | None = None
    teacher: float | None = None

    def __str__(self) -> str:
        interval = f"95 % interval of the change {self.change.low:.3g} to {self.change.high:.3g}"
        return f"{self.name} {self.before:.4g} before, {self.after:.4g} after ({interval})"


@dataclass(frozen=True)
class BestUntuned:
    """The best untuned choice that was measured, with as many network calls as the schedule makes.

    Attributes:
        sampler, grid: their names.
        teacher_l2: its mean distance to the teacher. change: the schedule's distance minus that, from the same noise.
    """

    sampler: str
    grid: str
    teacher_l2: float
    change: PairedComparison

    def __str__(self) -> str:
        interval = f"95 % interval of the difference {self.change.low:.3g} to {self.change.high:.3g}"
        return f"untuned {self.sampler} on the grid {self.grid}, which has {self.teacher_l2:.4g} ({interval})"


@dataclass(frozen=True)
class Evaluation:
    """A tuned schedule against its untuned twin, from the same noise.

    Attributes:
        metrics: by name: `teacher_l2`, `sliced_wasserstein`, and, where they could be measured, `frechet`,
            `frechet_features`, `wasserstein`, `kl`, `frechet_to_data`.
        adds_noise: whether the sampler does. Then no sample of it is meant to be the teacher's, and the distance
            of distributions decides: the first of `frechet`, `frechet_features` and `sliced_wasserstein`.
        num_samples: how many noises it is from.
        worth: how many untuned steps it is worth; None if that was not measured.
        best_untuned: what the distance to the teacher has to be below of, too; None if that was not looked for.
        by_precision: the schedule in float32, as before, and in the precision of these figures, as after; None if they
            are of float32.
        guidance_scale: the scale that the figures are of, where several were evaluated.
        at_scales: the evaluation at each guidance scale, where several were evaluated; see `of_scales`.
    """

    metrics: Mapping[str, Metric]
    adds_noise: bool = False
    num_samples: int = 0
    worth: Worth | None = None
    best_untuned: BestUntuned | None = None
    by_precision: Metric | None = None
    guidance_scale: float | None = None
    at_scales: Mapping[float, "Evaluation"] = field(default_factory=dict)

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
    def verdict(self) -> Verdict:
        """Whether tuning helped and harmed nothing, each beyond chance.

        `rejected`: an interval lies above 0, a figure is not finite, a distance of distributions is above that of
        diffusers' own time grid, the best untuned choice is nearer to the teacher, or a lesser precision than float32
        costs more than `PRECISION_MARGIN`.
        `undecided`: the deciding metric's interval holds 0, or that of the difference to the best untuned choice, or a
        Fréchet distance rose and its interval reaches above the margin, or what the precision costs may be above its
        margin, so that only more samples can tell.
        """
        if self._harm is not None:
            return "rejected"
        return "accepted" if self._doubt is None else "undecided"

    @property
    def better(self) -> bool:
        """Whether it is accepted."""
        return self.verdict == "accepted"

    @property
    def reason(self) -> str:
        """Why it is accepted, rejected or undecided: the metric that says so, and its figures."""
        beside_float32 = (
            "" if self.by_precision is None else f"; the same in float32, and as it is: {self.by_precision}"
        )
        reason = self._harm or self._doubt or f"fell: {self.deciding}{beside_float32}"
        return reason if self.guidance_scale is None else f"at guidance scale {self.guidance_scale:g} {reason}"

    @property
    def _judged(self) -> list[Metric]:
        """The metrics that may reject it."""
        left_out = (FRECHET_TO_DATA, "teacher_l2") if self.adds_noise else (FRECHET_TO_DATA,)
        return [metric for metric in self.metrics.values() if metric.name not in left_out]

    @property
    def _harm(self) -> str | None:
        for metric in self._judged:
            if not math.isfinite(metric.after) or metric.change.significantly_higher:
                return f"rose: {metric}"
        best = self.best_untuned
        if best is not None and best.change.significantly_higher:
            return f"farther from the teacher than {best}"
        cost = self.by_precision
        if cost is not None and cost.change.low > PRECISION_MARGIN * cost.before:
            return f"worse than in float32: {cost}"
        return self._worse_than_stock()

    @property
    def _doubt(self) -> str | None:
        if not self.deciding.change.significantly_lower:
            return f"did not fall beyond chance: {self.deciding}"
        best = self.best_untuned
        if best is not None and not best.change.significantly_lower:
            return f"not nearer to the teacher, beyond chance, than {best}"
        cost = self.by_precision
        if cost is not None and not cost.change.high <= PRECISION_MARGIN * cost.before:
            return f"may be worse than in float32: {cost}"
        for metric in self._judged:
            within_margin = metric.change.high <= FRECHET_MARGIN * metric.before
            if metric.name in FRECHET_METRICS and metric.change.mean > 0 and not within_margin:
                return f"may have risen: {metric}"
        return None

    def _worse_than_stock(self) -> str | None:
        names = [name for name in FRECHET_METRICS if name in self.metrics] or ["sliced_wasserstein"]
        for metric in map(self.metrics.get, names):
            if metric is not None and metric.stock is not None and metric.after > metric.stock:
                return f"worse than diffusers' own time grid, which has {metric.stock:.4g}: {metric}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON takes; figures that are not finite are None."""
        metrics = {name: _finite(asdict(metric)) for name, metric in self.metrics.items()}
        names = ("verdict", "better", "reason", "score", "adds_noise", "num_samples")
        return _finite({name: getattr(self, name) for name in names}) | {"metrics": metrics}


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
    teacher: Mapping[str, Estimate] | None = None,
    adds_noise: bool = False,
) -> Evaluation:
    """Two samplers' figures, by `measure`, from the same noise in the same order. Raises: see `bootstrap`.

    Args:
        stock: those of diffusers' own time grid; the distance to a teacher is none of them.
        teacher: those of the teacher's samples, where they say something.
    """
    stocks = {name: estimate.value for name, estimate in (stock or {}).items() if name != "teacher_l2"}
    teachers = {name: estimate.value for name, estimate in (teacher or {}).items()}
    metrics = {
        name: Metric(
            name,
            before[name].value,
            after[name].value,
            bootstrap(before[name], after[name]),
            stocks.get(name),
            teachers.get(name),
        )
        for name in before
    }
    return Evaluation(metrics, adds_noise, len(before["teacher_l2"].influence) if "teacher_l2" in before else 0)


def of_scales(evaluations: Mapping[float, Evaluation]) -> Evaluation:
    """The evaluation of one schedule at several guidance scales.

    It is accepted only if it is accepted at all of them, and undecided if none rejects it. Its figures are those of the
    scale that decides: of a rejected one before an undecided one, and of these the one with the highest score.
    """
    of_each = {scale: replace(each, guidance_scale=scale) for scale, each in evaluations.items()}
    order: tuple[Verdict, ...] = ("accepted", "undecided", "rejected")

    def badness(each: Evaluation) -> tuple[int, float]:
        return order.index(each.verdict), math.inf if math.isnan(each.score) else each.score

    return replace(max(of_each.values(), key=badness), at_scales=of_each)


def evaluate(
    sample: Callable[[Tensor, Tensor | None], Tensor],
    timesteps: Tensor,
    t_ratios: Tensor,
    teacher_samples: Tensor,
    reference: Tensor | None,
    *,
    data: Tensor | None = None,
    untuned_timesteps: Tensor | None = None,
    stock_timesteps: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    mixture: GaussianMixture | None = None,
    kl: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    adds_noise: bool = False,
    in_float32: Tensor | None = None,
) -> Evaluation:
    """Compare `sample(timesteps, t_ratios)` with `sample(untuned_timesteps, None)`, both from the teacher's noise.

    Args:
        untuned_timesteps: the untuned sampler's grid; default the same.
        stock_timesteps: diffusers' own grid, whose samples a better schedule's must not be worse than; None for none.
        teacher_samples: `(B, ...)`. reference: data `(P, ...)`; None compares with the teacher's samples.
        data: `(P, ...)`, to which distances are information only, as the samples are not meant to be distributed so.
        features, mixture: see `data_measures`; a mixture only if its samples are what is asked for, without
            guidance.
        kl: like `sample`, but gives `sampler_kl` of that schedule.
        adds_noise: see `Evaluation`.
        in_float32: what the schedule samples in float32, `(B, ...)`, where `sample` takes it in a lesser precision.
    """
    untuned = timesteps if untuned_timesteps is None else untuned_timesteps
    measures = data_measures(teacher_samples if reference is None else reference, features, mixture)
    taught: dict[str, Estimate] = {}
    if data is not None and data[0].numel() <= MAX_FRECHET_DIMENSION:
        measures[FRECHET_TO_DATA] = to_data = Frechet.to(data)
        taught[FRECHET_TO_DATA] = to_data(teacher_samples)

    def figures(timesteps: Tensor, t_ratios: Tensor | None, *, with_kl: bool = True) -> dict[str, Estimate]:
        kl_terms = kl(timesteps, t_ratios) if kl is not None and with_kl else None
        return measure(sample(timesteps, t_ratios), teacher_samples, measures, kl_terms)

    stock = None if stock_timesteps is None else figures(stock_timesteps, None, with_kl=False)
    before, after = figures(untuned, None), figures(timesteps, t_ratios)
    evaluation = compare(before, after, stock=stock, teacher=taught, adds_noise=adds_noise)
    if in_float32 is None:
        return evaluation
    name, exact = evaluation.deciding.name, measure(in_float32, teacher_samples, measures, None)
    by_precision = Metric(name, exact[name].value, after[name].value, bootstrap(exact[name], after[name]))
    return replace(evaluation, by_precision=by_precision)
