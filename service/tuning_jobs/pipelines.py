"""Checks of tuning jobs on whole pipelines, which have one tuner, and an evaluation of their own."""

import math
from collections.abc import Sequence
from typing import Any

from service.http.errors import InvalidError, TooLargeError
from service.shared.job_requests import EvaluationRequest, TuningJobRequest
from service.shared.pipeline_calls import output_shape
from service.shared.sampler_facts import sampler_facts
from service.shared.settings import Settings
from timetuner_core.catalog import sampler_names
from timetuner_core.tuners import EVALUATED_SCALES, PipelineTuner

DEFAULT_SAMPLER = "dpmpp_2m"
DEFAULT_HELD_OUT = 16
DEFAULT_TEACHER_STEPS = 50


def check_tunable(request: TuningJobRequest, spec: dict[str, Any]) -> None:
    """Refuse a pipeline without a teacher of many steps, or whose scheduler is not known. Raises: InvalidError."""
    if (reason := spec.get("tunable")) is not None:
        raise InvalidError(f"model cannot be tuned: {reason}; accepted: another", ("body", "model"), request.model)


def check_pipeline_job(
    request: TuningJobRequest, spec: dict[str, Any], settings: Settings
) -> tuple[TuningJobRequest, int, int]:
    """The request as it is stored, its steps of single images at most, and the values of an image.

    Raises:
        InvalidError, TooLargeError.
    """
    if request.timesteps != "default":
        message = "timesteps is given, and the tuner of pipelines finds its own; accepted: 'default'"
        raise InvalidError(message, ("body", "timesteps"))
    if not sampler_facts(request.sampler).is_table_of_steps:
        accepted = ", ".join(name for name in sampler_names() if sampler_facts(name).is_table_of_steps)
        message = f"sampler is {request.sampler!r}; accepted for a pipeline: {accepted}"
        raise InvalidError(message, ("body", "sampler"), request.sampler)
    _check_prompts(request)
    complete = request.model_copy(update={"tuner": _tuner(request), "evaluation": _evaluation(request)})
    assert isinstance(complete.tuner, PipelineTuner)
    evaluation = complete.evaluation
    if evaluation.teacher_num_steps <= request.num_steps:
        message = f"evaluation.teacher_num_steps is {evaluation.teacher_num_steps}; accepted: more than num_steps"
        loc = ("body", "evaluation", "teacher_num_steps")
        raise InvalidError(message, loc, evaluation.teacher_num_steps)
    num_scales = 1 if request.guidance_scales is None else EVALUATED_SCALES
    steps = complete.tuner.image_steps(
        request.num_steps, evaluation.teacher_num_steps, evaluation.num_samples, num_scales
    )
    if steps > settings.max_tuning_calls:
        detail = f"the job takes {steps} steps of single images; accepted: {settings.max_tuning_calls}"
        raise TooLargeError(detail, ("body", "tuner", "total_iters"), complete.tuner.total_iters)
    sizes: Sequence[Sequence[int | None]] = request.sizes or [(request.height, request.width)]
    values = max(math.prod(output_shape(spec, height, width, request.call)) for height, width in sizes)
    # Latents grow with the result.
    latents = math.prod(spec["sample_shape"]) * values // math.prod(spec["image_shape"])
    if latents * complete.tuner.max_batch > settings.max_tuning_batch_values:
        held = latents * complete.tuner.max_batch
        detail = f"tuning holds {held} values at once; accepted: {settings.max_tuning_batch_values}"
        raise TooLargeError(detail, ("body", "tuner", "max_batch"), complete.tuner.max_batch)
    return complete, steps, values


def _check_prompts(request: TuningJobRequest) -> None:
    """Refuse empty prompts, and fewer than two different ones: one is to tune on, one to evaluate on."""
    if request.prompts is None:
        return
    for number, prompt in enumerate(request.prompts):
        if not prompt.strip():
            raise InvalidError(f"prompts[{number}] is empty; accepted: a text", ("body", "prompts", number))
    if (count := len(set(request.prompts))) < 2:
        raise InvalidError(f"prompts has {count} different one; accepted: 2 or more", ("body", "prompts"))


def _tuner(request: TuningJobRequest) -> PipelineTuner:
    if "tuner" not in request.model_fields_set:
        return PipelineTuner(objective="pipeline")
    if not isinstance(request.tuner, PipelineTuner):
        message = f"tuner.objective is {request.tuner.objective!r}; accepted for a pipeline: 'pipeline'"
        raise InvalidError(message, ("body", "tuner", "objective"), request.tuner.objective)
    return request.tuner


def _evaluation(request: TuningJobRequest) -> EvaluationRequest:
    """The evaluation with a pipeline's defaults. It is done once, however undecided it is."""
    given = request.evaluation.model_fields_set
    for name in ("max_num_samples", "batch_size"):
        if name in given and (value := getattr(request.evaluation, name)) is not None:
            message = f"evaluation.{name} is {value}; accepted for a pipeline: an evaluation without it"
            raise InvalidError(message, ("body", "evaluation", name), value)
    defaults = {"num_samples": DEFAULT_HELD_OUT, "teacher_num_steps": DEFAULT_TEACHER_STEPS}
    found = {name: value for name, value in defaults.items() if name not in given}
    return request.evaluation.model_copy(update=found)
