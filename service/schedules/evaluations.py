"""Findings of evaluations, as the API tells them: figures, and a sentence or two."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class MetricOut(BaseModel):
    """One figure, the better the lower, untuned and tuned; null where it is not finite."""

    before: float | None
    after: float | None
    change: float | None = Field(description="after - before.")
    low: float | None = Field(description="95 % bootstrap interval of the change.")
    high: float | None
    stock: float | None = Field(
        None,
        description="On the time grid that diffusers takes by default for the model, untuned, with as many steps; "
        "null where it was not measured. A schedule whose distance to the data is above it is rejected.",
    )
    teacher: float | None = Field(None, description="Of the teacher's samples; null where it was not measured.")


class UntunedOut(BaseModel):
    """The untuned sampler with some number of steps."""

    num_steps: int = Field(examples=[10])
    teacher_l2: float = Field(examples=[0.62], description="The mean distance to the teacher.")


class WorthOut(BaseModel):
    """How many steps the untuned sampler takes to come as near to the teacher as the schedule."""

    num_steps: float | None = Field(
        examples=[14.2],
        description="Between two measured numbers by a line in logarithms. Null: nearer than all that were measured "
        "(`is_beyond`), or than none.",
    )
    is_beyond: bool = Field(examples=[False])
    grid: str = Field(examples=["log_snr"], description="The untuned time grid: the best named one at as many steps.")
    teacher_l2: float = Field(examples=[0.45], description="The schedule's mean distance to the teacher.")
    num_samples: int = Field(examples=[128])
    untuned: list[UntunedOut] = Field(description="Up to four times as many steps, below the teacher's.")


class BestUntunedOut(BaseModel):
    """The best untuned choice that was measured, with as many network calls, and how much nearer the schedule is."""

    sampler: str = Field(examples=["ddim"])
    grid: str = Field(examples=["log_snr"])
    teacher_l2: float | None = Field(examples=[0.62], description="Its mean distance to the teacher.")
    change: float | None = Field(examples=[-0.17], description="The schedule's distance minus that.")
    low: float | None = Field(examples=[-0.2], description="95 % bootstrap interval of the change.")
    high: float | None = Field(examples=[-0.14])


class ScaleOut(BaseModel):
    """The findings at one guidance scale, of a schedule for an interval of them."""

    guidance_scale: float = Field(examples=[1.5])
    verdict: Literal["accepted", "rejected", "undecided"]
    reason: str
    score: float | None = Field(examples=[0.73])
    num_samples: int = Field(examples=[512])
    metrics: dict[str, MetricOut]
    worth: WorthOut | None = None
    best_untuned: BestUntunedOut | None = None


class EvaluationOut(BaseModel):
    """Tuned against untuned, from the same held-out noise."""

    model_config = ConfigDict(from_attributes=True)

    num_samples: int = Field(examples=[512])
    teacher_num_steps: int = Field(examples=[100])
    seed: int = Field(examples=[0])
    teacher_l2_before: float = Field(
        examples=[1.07], description="Mean Euclidean distance to the teacher's samples, untuned."
    )
    teacher_l2_after: float = Field(examples=[0.78])
    teacher_l2_change_low: float = Field(examples=[-0.32], description="95 % confidence interval of the paired change.")
    teacher_l2_change_high: float = Field(examples=[-0.26])
    frechet_before: float | None = Field(description="The metric `frechet`, untuned, in pixel space.")
    frechet_after: float | None
    metrics: dict[str, MetricOut] = Field(
        examples=[{"teacher_l2": {"before": 1.07, "after": 0.78, "change": -0.29, "low": -0.32, "high": -0.26}}],
        description="Figures by name: `teacher_l2`, `sliced_wasserstein` and, where they could be measured, `frechet`, "
        "`frechet_features` (of a classifier that came with the model), `wasserstein` and `kl` (of mixtures, exact). "
        "They are to the data, and where guidance moves the samples away from the data, to the teacher's samples; then "
        "`frechet_to_data` is information that decides nothing.",
    )
    verdict: Literal["accepted", "rejected", "undecided"] | None = Field(
        None,
        description="`rejected`: harm was found beyond chance. `undecided`: neither a gain nor harm was, with "
        "`max_num_samples`; the schedule's status is `rejected`, too. Null: an earlier version evaluated it.",
    )
    reason: str | None = Field(
        examples=["closer to the teacher, and no metric is worse"],
        description="Why the schedule was accepted, rejected or left undecided.",
    )
    worth: WorthOut | None = Field(None, description="Null: not measured, as of samplers that add noise.")
    best_untuned: BestUntunedOut | None = Field(
        None,
        description="The sampler on the best named time grid. A schedule is accepted only if it is nearer to the "
        "teacher than that. Null: not measured, as of samplers that add noise.",
    )
    guidance_scale: float | None = Field(
        None,
        examples=[None],
        description="The scale that these figures are of, where the schedule is for an interval: the one that decides, "
        "as it was rejected, else undecided, else has the highest score. Null: the schedule is for one scale.",
    )
    at_scales: list[ScaleOut] | None = Field(
        None,
        examples=[None],
        description="What was found at both ends of an interval of guidance scales, and in the middle.",
    )
    summary: str | None = Field(
        None,
        examples=["5 steps, as good as 14 untuned: 64% fewer."],
        description="What the schedule brought, and by what evidence, in a sentence or two.",
    )
    wall_time_seconds: float = Field(description="The time of tuning, summed over workers, without the evaluation.")
    network_calls: int = Field(description="Samples put through the network while tuning. Guidance counts, too.")

    def summarised(self, num_steps: int) -> str | None:
        """The findings of a schedule of `num_steps`: what it brought, and by what evidence."""
        if self.verdict in ("rejected", "undecided"):
            return f"{self.verdict.capitalize()}: {self.reason}."
        found = [sentence for sentence in (_worth(num_steps, self.worth), _closer(self)) if sentence]
        if self.guidance_scale is not None and found:
            found.insert(0, f"At guidance scale {self.guidance_scale:g}, where it gains least:")
        return " ".join(found) or self.reason


def _worth(num_steps: int, worth: WorthOut | None) -> str | None:
    if worth is None:
        return None
    if worth.is_beyond:
        return f"{num_steps} steps, better than {worth.untuned[-1].num_steps} untuned."
    untuned = 0 if worth.num_steps is None else math.floor(worth.num_steps)
    if untuned <= num_steps:
        return None
    return f"{num_steps} steps, as good as {untuned} untuned: {1 - num_steps / untuned:.0%} fewer."


def _closer(evaluation: EvaluationOut) -> str | None:
    """How much closer to the teacher; None where that did not fall beyond chance, as of samplers that add noise."""
    before, after = evaluation.teacher_l2_before, evaluation.teacher_l2_after
    if not 0 < before < math.inf or evaluation.teacher_l2_change_high >= 0:
        return None
    ends = [-change / before for change in (evaluation.teacher_l2_change_high, evaluation.teacher_l2_change_low)]
    return (
        f"{1 - after / before:.0%} closer to the teacher of {evaluation.teacher_num_steps} steps "
        f"(95 %: {ends[0]:.0%} to {ends[1]:.0%}), on {evaluation.num_samples} noises that tuning had not seen."
    )
