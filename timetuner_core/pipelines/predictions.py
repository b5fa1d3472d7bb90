"""Predictions of a scheduler in a step: the clean sample x0, by what its `step` returns or remembers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Schedulers of several steps remember x0 where they are set up so.
PREDICTS_X0 = ("dpmsolver++", "sde-dpmsolver++")


def predicted_x0(scheduler: Any, model_output: Tensor, sample: Tensor, output: Sequence[Any]) -> Tensor | None:
    """The x0 that a step of a scheduler has just predicted; None where the scheduler does not tell it.

    Args:
        model_output, sample: what the step was given. output: what it returned.
    """
    x0 = output[1] if len(output) > 1 else None
    if isinstance(x0, Tensor):
        return x0
    if hasattr(scheduler, "scale_noise"):  # Flow matching: x_t = (1 - sigma) x0 + sigma noise, and v = noise - x0.
        index = getattr(scheduler, "_step_index", None)
        return None if not index else sample - scheduler.sigmas[index - 1] * model_output
    remembered = getattr(scheduler, "model_outputs", None)
    is_x0 = scheduler.config.get("algorithm_type") in PREDICTS_X0 or scheduler.config.get("predict_x0")
    return remembered[-1] if remembered and is_x0 else None


class ShownStep(tuple[Tensor]):
    """The answer of a scheduler's `step`, for a step that ends at a given sample."""

    @property
    def prev_sample(self) -> Tensor:
        return self[0]

    @property
    def pred_original_sample(self) -> Tensor:
        return self[0]
