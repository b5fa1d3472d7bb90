"""Exports of a schedule's grid alone: lists for diffusers, for ComfyUI and for stable-diffusion.cpp."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from timetuner_core.exports.formats import Exported, ExportError
from timetuner_core.exports.levels import EULER_SAMPLERS, Levels, check_losses

# Smaller deviations cannot be seen in a sample.
MAX_RELATIVE_DEVIATION = 1e-4
# A told time that is off by more, of the steps that the network was trained on, is a loss.
MAX_TOLD_DEVIATION = 0.5

# These make a scheduler of diffusers follow other noise levels than the given ones.
RESHAPING = ("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def diffusers_sigmas(levels: Levels, lossy: bool) -> Exported:
    """`sigmas` for `set_timesteps` of a scheduler of diffusers, as JSON.

    EulerDiscreteScheduler takes the end of the last step, too. FlowMatchEulerDiscreteScheduler does not, and shifts
    what it is given. The list is given to the scheduler here, and what it makes of it is compared with the schedule.

    Raises:
        ExportError: the schedule is more than a grid and `lossy` is not set, or diffusers takes no such list.
    """
    if levels.kind == "edm":
        accepted = "the formats json, card, diffusers and comfyui-node"
        raise ExportError(f"EDMEulerScheduler takes no list of noise levels; accepted: {accepted}")
    name, changes, sigmas = _for_flow(levels) if levels.is_flow else _for_euler(levels)
    losses = levels.losses(EULER_SAMPLERS, name)
    more_losses, notes = _deviations(levels, _scheduler_with(levels, name, changes, sigmas))
    losses += more_losses
    check_losses(losses, lossy)
    changed = "".join(f", {field}={value!r}" for field, value in changes.items())
    content: dict[str, Any] = {
        "format": "sigmas",
        "scheduler": name,
        "changes": changes,
        "sigmas": sigmas,
        "num_steps": levels.num_steps,
        "usage": [
            f"pipeline.scheduler = {name}.from_config(pipeline.scheduler.config{changed})",
            "pipeline(..., sigmas=sigmas)  # or scheduler.set_timesteps(sigmas=sigmas)",
        ],
        "not_carried": [*losses, *notes, *levels.notes],
    }
    return Exported((json.dumps(content, indent=2) + "\n").encode(), content["not_carried"])


def comfyui_sigmas(levels: Levels, lossy: bool) -> Exported:
    """The text for ComfyUI's node ManualSigmas in the first line, and below it what to know.

    Raises:
        ExportError: the schedule is more than a grid, and `lossy` is not set.
    """
    # dpmpp_2m of ComfyUI works in log sigma, which is lambda unless the model is of flow matching.
    samplers = EULER_SAMPLERS if levels.is_flow else (*EULER_SAMPLERS, "dpmpp_2m")
    losses = levels.losses(samplers, "ComfyUI")
    check_losses(losses, lossy)
    sampler = "dpmpp_2m" if levels.schedule["sampler"] == "dpmpp_2m" and not levels.is_flow else "euler"
    notes = [*_rounded_times(levels), *_end_note(levels), *levels.notes]
    usage = f"SamplerCustom with the sampler {sampler} and the first line in ManualSigmas."
    return _text(levels, ", ".join(_plain(sigma) for sigma in levels.sigmas.tolist()), usage, [*losses, *notes])


def sdcpp_arguments(levels: Levels, lossy: bool) -> Exported:
    """Arguments of stable-diffusion.cpp in the first line, and below it what to know.

    Raises:
        ExportError: the schedule is more than a grid, and `lossy` is not set.
    """
    if levels.kind == "edm":
        raise ExportError("stable-diffusion.cpp has no EDM models; accepted: the formats json, card and diffusers")
    samplers = EULER_SAMPLERS if levels.is_flow else (*EULER_SAMPLERS, "dpmpp_2m")
    losses = levels.losses(samplers, "stable-diffusion.cpp")
    check_losses(losses, lossy)
    method = "dpm++2m" if levels.schedule["sampler"] == "dpmpp_2m" and not levels.is_flow else "euler"
    sigmas = ",".join(_plain(sigma) for sigma in levels.sigmas.tolist())
    line = f'--sigmas "{sigmas}" --steps {levels.num_steps} --sampling-method {method}'
    return _text(
        levels, line, "sd -m MODEL -p PROMPT and the first line.", [*losses, *_end_note(levels), *levels.notes]
    )


def _text(levels: Levels, line: str, usage: str, not_carried: list[str]) -> Exported:
    """A file whose first line is what a program takes. The lines below are for people."""
    below = [f"Use: {usage}", f"Schedule: {levels.schedule.get('id', 'without an id')}"]
    below += [f"Not carried: {sentence}" for sentence in not_carried] or ["Not carried: nothing is left out."]
    return Exported("\n".join([line, *(f"# {sentence}" for sentence in below), ""]).encode(), not_carried)


def _plain(number: float) -> str:
    """A number without an exponent, which ComfyUI would read as a second number."""
    return f"{number:.9f}".rstrip("0").rstrip(".") or "0"


def _for_euler(levels: Levels) -> tuple[str, dict[str, Any], list[float]]:
    """The class, changes of its configuration, and `num_steps + 1` noise levels."""
    sigma, alpha = float(levels.sigmas[0]), float(levels.alphas[0])
    wanted = levels.noise_schedule.starting_std(levels.timesteps[0]) / alpha
    scales = {"leading": math.sqrt(sigma**2 + 1), "linspace": sigma}  # The first noise's, by timestep_spacing.
    own = levels.config.get("timestep_spacing", "linspace")
    spacing = min(scales, key=lambda name: abs(scales[name] - wanted))
    is_own = (
        levels.config.get("_class_name") == "EulerDiscreteScheduler"
        and {"trailing": "linspace"}.get(own, own) == spacing
    )
    return "EulerDiscreteScheduler", {} if is_own else {"timestep_spacing": spacing}, levels.sigmas.tolist()


def _for_flow(levels: Levels) -> tuple[str, dict[str, Any], list[float]]:
    """The class, changes of its configuration, and the `num_steps` noise levels that it shifts to the schedule's."""
    name = "FlowMatchEulerDiscreteScheduler"
    changes: dict[str, Any] = {field: None if field == "shift_terminal" else False for field in RESHAPING}
    changes = {field: value for field, value in changes.items() if levels.config.get(field)}
    sigmas = levels.sigmas[:-1]
    if changes or levels.config.get("_class_name") != name:
        return name, changes | {"shift": 1.0}, sigmas.tolist()
    shift = float(levels.config.get("shift", 1.0))
    return name, {}, (sigmas / (shift - (shift - 1) * sigmas)).tolist()


def _scheduler_with(levels: Levels, name: str, changes: dict[str, Any], sigmas: Sequence[float]) -> Any:
    """A scheduler of diffusers that was given the list. Raises: ExportError."""
    import diffusers

    try:
        scheduler = getattr(diffusers, name).from_config(dict(levels.config), **changes)
        scheduler.set_timesteps(sigmas=list(sigmas))
    except (ValueError, TypeError) as error:
        raise ExportError(
            f"{name} refuses the list ({error}); accepted: the formats json, card and diffusers"
        ) from None
    return scheduler


def _deviations(levels: Levels, scheduler: Any) -> tuple[list[str], list[str]]:
    """Losses and notes: how what a scheduler of diffusers does deviates from the schedule's grid."""
    losses, notes = [], []
    found = scheduler.sigmas.double()
    if float((found[:-1] - levels.sigmas[:-1]).abs().div(levels.sigmas[:-1]).max()) > MAX_RELATIVE_DEVIATION:
        losses.append(f"the noise levels are not carried: {type(scheduler).__name__} makes {_list(found)} of them")
    if abs(float(found[-1] - levels.sigmas[-1])) > MAX_RELATIVE_DEVIATION:
        losses.append(
            f"the end of the grid is not carried: it is {float(levels.sigmas[-1]):.4g}, and becomes {found[-1]:.4g}"
        )
    told = levels.noise_schedule.model_input_time(levels.timesteps[:-1])
    off = float((scheduler.timesteps.double() - told).abs().max())
    if off > MAX_TOLD_DEVIATION:
        losses.append(
            f"times are not carried: the network is told {_list(scheduler.timesteps)} in place of {_list(told)}"
        )
    elif off > 0.01:
        notes.append(f"the network is told times up to {off:.2g} off, of the steps that it was trained on")
    if not levels.is_flow:
        wanted = levels.noise_schedule.starting_std(levels.timesteps[0]) / float(levels.alphas[0])
        scale = float(scheduler.init_noise_sigma) / wanted
        if abs(scale - 1) > MAX_RELATIVE_DEVIATION:
            notes.append(f"the first noise is scaled by {scale:.4f}")
    return losses, [*notes, *_end_note(levels)]


def _end_note(levels: Levels) -> list[str]:
    alpha, sigma = float(levels.alphas[-1]), float(levels.sigmas[-1])
    if levels.is_flow or 1 - alpha <= MAX_RELATIVE_DEVIATION:
        return []
    return [f"the grid ends at the noise level {sigma:.4g}, where the result is divided by alpha = {alpha:.5f}"]


def _rounded_times(levels: Levels) -> list[str]:
    if levels.kind != "vp":
        return []
    told = levels.noise_schedule.model_input_time(levels.timesteps[:-1])
    off = float((told - told.round()).abs().max())
    return [f"ComfyUI rounds the told times to whole training steps, by up to {off:.2g}"] if off > 0.01 else []


def _list(values: torch.Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]
