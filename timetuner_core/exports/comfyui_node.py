"""A tuned schedule as a node of ComfyUI: it gives a SAMPLER and the SIGMAS that belong to it.

The file goes into ComfyUI's folder `custom_nodes`. The node is in `sampling/custom_sampling/schedulers`, and its
outputs go to SamplerCustom or SamplerCustomAdvanced.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch

# An export replaces this by the schedule.
SCHEDULE: dict[str, Any] = json.loads(r"""{}""")


def sample(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """Take the schedule's steps: `x_{i+1} = a_i x_i + sum_{j <= i} b_ij x0_j`.

    Args:
        model: the guided model of ComfyUI, `(x, sigma) -> x0`.
        x: `(B, C, ...)`, at the first noise level.
        sigmas: those of the node, all of them.

    Raises:
        ValueError: other noise levels, or a model whose noise schedule is another than the tuned one's.
    """
    own = torch.tensor(SCHEDULE["sigmas"])
    if len(sigmas) != len(own) or not torch.allclose(sigmas.float().cpu(), own, rtol=1e-3, atol=1e-4):
        raise ValueError(f"sigmas is {sigmas.tolist()}; accepted: all of the node's own, {own.tolist()}")
    model_sampling = model.inner_model.inner_model.model_sampling
    largest = float(model_sampling.sigma_max)
    if abs(largest / SCHEDULE["sigma_max"] - 1) > 0.01:
        raise ValueError(f"the model's largest sigma is {largest:.4g}; accepted: {SCHEDULE['sigma_max']:.4g}, as tuned")
    predictions: list[torch.Tensor] = []
    for i, (a, row) in enumerate(zip(SCHEDULE["a"], SCHEDULE["b"], strict=True)):
        with _told(model_sampling, i):
            x0 = model(x, sigmas[i] * x.new_ones([x.shape[0]]), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        predictions.append(x0)
        x = a * x + sum(b * past for b, past in zip(row, predictions, strict=True))
    return x


@contextlib.contextmanager
def _told(model_sampling: Any, step: int) -> Iterator[None]:
    """Tell the network the schedule's time in this step, while all else goes by the true noise level."""
    original = model_sampling.timestep
    was_set = vars(model_sampling).get("timestep")

    def timestep(sigma: torch.Tensor) -> torch.Tensor:
        if SCHEDULE["kind"] == "vp":  # ComfyUI would round it to a whole training step.
            return torch.full_like(sigma, SCHEDULE["told_timesteps"][step], dtype=torch.float32)
        told: torch.Tensor = original(torch.full_like(sigma, SCHEDULE["told_sigmas"][step]))
        return told

    model_sampling.timestep = timestep
    try:
        yield
    finally:
        if was_set is None:
            del model_sampling.timestep
        else:
            model_sampling.timestep = was_set


class TimeTunerSchedule:
    """The node."""

    CATEGORY = "sampling/custom_sampling/schedulers"
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's own name)
        return {"required": {}}

    def load(self) -> tuple[Any, torch.Tensor]:
        import comfy.samplers

        return comfy.samplers.KSAMPLER(sample), torch.tensor(SCHEDULE["sigmas"])


_NAME = f"TimeTunerSchedule_{SCHEDULE.get('id', '')}"
NODE_CLASS_MAPPINGS = {_NAME: TimeTunerSchedule}
NODE_DISPLAY_NAME_MAPPINGS = {_NAME: SCHEDULE.get("title", "TimeTuner schedule")}
