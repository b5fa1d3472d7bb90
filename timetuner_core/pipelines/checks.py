"""Refusals of `tune_pipeline` before any work: prompts, arguments of the call, and pipelines without a teacher."""

import inspect
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from timetuner_core.models.schedulers import read_scheduler_config
from timetuner_core.pipelines.kinds import PIPELINES_WITHOUT_TEACHER, SCHEDULERS_WITHOUT_TEACHER, SHARED_NETWORKS
from timetuner_core.pipelines.schedule import SIZES
from timetuner_core.samplers import SAMPLERS, Sampler, get_sampler

# Arguments of pipelines that the tuner sets itself, or that would place the steps or change latents between them.
SET_BY_THE_TUNER = frozenset(
    {
        "batch_size",
        "callback",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "callback_steps",
        "eta",
        "generator",
        "latents",
        "num_images_per_prompt",
        "num_inference_steps",
        "num_videos_per_prompt",
        "output_type",
        "prompt",
        "prompt_embeds",
        "return_dict",
        "sigmas",
        "timesteps",
    }
)
NEEDED = ("num_inference_steps", "generator")
MIN_PROMPTS = 2  # One to tune on, and another one for the evaluation.

Prompts = Sequence[str] | str | PathLike[str] | None


def read_prompts(prompts: Prompts) -> list[str]:
    """Distinct prompts in their order: those given, the lines of a file, or for None our own.

    Raises:
        ValueError: too few, an empty one, or no such file.
    """
    if prompts is None:
        prompts = files(__package__).joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()
    elif isinstance(prompts, str | PathLike):
        try:
            prompts = Path(prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            accepted = "a list of prompts, or the path of a text file with one prompt per line"
            raise ValueError(f"prompts is {str(prompts)!r} ({error}); accepted: {accepted}") from None
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompts[{number}] is {prompt!r}; accepted: a text that is not empty")
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < MIN_PROMPTS:
        raise ValueError(f"prompts has {len(distinct)} different ones; accepted: {MIN_PROMPTS} or more")
    return distinct


def split_prompts(prompts: list[str]) -> tuple[list[str], list[str]]:
    """Every fourth prompt, and at least one, is held out: the prompts to tune on, and those to evaluate on."""
    held_out = prompts[3::4] or prompts[-1:]
    return [prompt for prompt in prompts if prompt not in held_out], held_out


def takes_prompts(pipeline: Any) -> bool:
    """Whether a pipeline's call has an argument `prompt`."""
    return "prompt" in inspect.signature(type(pipeline).__call__).parameters


def check_tunable(pipeline: Any) -> None:
    """Refuse what has no many-step teacher, and schedulers that cannot be expressed.

    Raises:
        ValueError: what is at fault, and what is accepted.
    """
    accepted = "a pipeline whose samples get better with more steps"
    if type(pipeline).__name__ in PIPELINES_WITHOUT_TEACHER:
        raise ValueError(f"pipeline is a {type(pipeline).__name__}, trained for few steps; accepted: {accepted}")
    config = dict(pipeline.scheduler.config)
    name = config.get("base_scheduler", {}).get("_class_name", type(pipeline.scheduler).__name__)
    if name in SCHEDULERS_WITHOUT_TEACHER:
        raise ValueError(f"pipeline.scheduler is a {name}, for networks trained for few steps; accepted: {accepted}")
    networks = [part for name in SHARED_NETWORKS if (part := getattr(pipeline, name, None)) is not None]
    if any(getattr(network, "config", {}).get("time_cond_proj_dim") for network in networks):
        raise ValueError("the network is told the guidance scale, as LCM's is (time_cond_proj_dim); accepted: others")
    read_scheduler_config({**config, "_class_name": type(pipeline.scheduler).__name__})
    parameters = inspect.signature(type(pipeline).__call__).parameters
    for needed in NEEDED:
        if needed not in parameters:
            raise ValueError(f"{type(pipeline).__name__} has no argument {needed!r}; accepted: a pipeline with it")


def check_call(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Refuse arguments that a pipeline's call does not have by its signature, though it may swallow them.

    Raises:
        ValueError: which one, and what is accepted.
    """
    known = {
        name
        for name, parameter in inspect.signature(type(pipeline).__call__).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    } - {"self"}
    accepted = sorted(known - SET_BY_THE_TUNER)
    for name, value in call.items():
        if name in SET_BY_THE_TUNER:
            raise ValueError(f"{name} is {value!r}, but the tuner sets it; accepted: {', '.join(accepted)}")
        if name not in known:
            meant = get_close_matches(name, accepted, 1)
            question = f"; did you mean {meant[0]!r}?" if meant else ""
            kind = type(pipeline).__name__
            raise ValueError(f"{kind} has no argument {name!r}{question} accepted: {', '.join(accepted)}")


def split_sizes(call: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """The arguments that all calls share, and the sizes that they have in turn: one empty dictionary if just one.

    Raises:
        ValueError: a list that is no list of sizes, or is as long as no other.
    """
    lists = {name: list(call[name]) for name in SIZES if isinstance(call.get(name), list | tuple)}
    for name, values in lists.items():
        if not values or not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(f"{name} is {values}; accepted: a size, or a list of sizes")
        longest = max(map(len, lists.values()))
        if len(values) != longest:
            raise ValueError(f"{name} has {len(values)} sizes; accepted: {longest}, as the longest list has")
    shared = {name: value for name, value in call.items() if name not in lists}
    return shared, [dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)] or [{}]


def split_scales(call: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[float, float] | None]:
    """The arguments that all calls share, and the lowest and the highest guidance scale, if that is an interval.

    Raises:
        ValueError: no interval.
    """
    scales = call.get("guidance_scale")
    if not isinstance(scales, list | tuple):
        return dict(call), None
    are_numbers = all(isinstance(scale, int | float) and math.isfinite(scale) for scale in scales)
    if len(scales) != 2 or not are_numbers or not scales[0] < scales[1]:
        raise ValueError(f"guidance_scale is {list(scales)}; accepted: a number, or the lowest, then a higher one")
    shared = {name: value for name, value in call.items() if name != "guidance_scale"}
    return shared, (float(scales[0]), float(scales[1]))


def check_sampler(name: str) -> Sampler:
    """The sampler by name. Raises: ValueError, if it adds noise or calls the network several times per step."""
    sampler = get_sampler(name)
    if not sampler.facts.is_table_of_steps:
        accepted = ", ".join(each.name for each in SAMPLERS.values() if each.facts.is_table_of_steps)
        raise ValueError(f"sampler is {name!r}; accepted, without noise and with one call per step: {accepted}")
    return sampler
