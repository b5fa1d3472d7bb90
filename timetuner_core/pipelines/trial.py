"""A first call of a loaded pipeline: whether it works in its precision, and the shapes of what it gives."""

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from timetuner_core.models.folder_files import MODEL_INDEX, ModelFormatError
from timetuner_core.models.out_of_memory import is_out_of_memory
from timetuner_core.pipelines.kinds import DEFAULT_SIZES, VAE_FACTORS
from timetuner_core.pipelines.shared_calls import Request, Result, SharedCalls

NUM_STEPS = 2
PROMPT = "a photograph of a lighthouse"
DEFAULT_SIZE = 512  # Pictures have this size where a pipeline does not say what it expects.
MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_SHOWN_CHARACTERS = 500


def try_pipeline(pipeline: Any, spec: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """A spec of `inspecting.inspect_pipeline`, completed by a call of the pipeline with default arguments.

    Arguments without which the call fails, a prompt and the images of image-to-image among them, become required in
    `call`.

    Args:
        given: arguments in place of defaults.

    Raises:
        ModelFormatError: the call fails, or gives what the service cannot return.
        MemoryError: this machine is too small for it.
    """
    shared = SharedCalls(pipeline, max_batch=2**20)
    arguments = spec["call"]
    call = _call_of(pipeline, arguments, given, with_images=False)
    result = _try(shared, call)
    if result.error is not None and (pictures := _call_of(pipeline, arguments, given, with_images=True)) != call:
        call = pictures
        result = _try(shared, call)
    if result.error is not None:
        _refuse(pipeline, result.error)
    name, sample = _sample_of(pipeline, result)
    if result.x is None:
        raise _error(pipeline, "it makes no step of its scheduler; accepted: pipelines that do")
    if not (torch.isfinite(result.x).all() and torch.isfinite(sample).all()):
        message = (
            f"in {spec['dtype']}, it gives values that are not finite; accepted: finite ones, in another dtype, say"
        )
        raise _error(pipeline, message)
    required = {argument for argument in arguments if arguments[argument]["required"] or argument in _images(call)}
    if "prompt" in arguments and not _is_called(shared, {name: call[name] for name in call if name != "prompt"}):
        required.add("prompt")
    return {
        **spec,
        "call": {argument: {**facts, "required": argument in required} for argument, facts in arguments.items()},
        "output": name,
        "image_shape": list(sample.shape),
        "sample_shape": list(result.x.shape[1:]),
        "size_multiple": _size_multiple(pipeline, shared, call) if "height" in arguments else 1,
    }


def image_size(pipeline: Any) -> tuple[int, int]:
    """The height and width that a pipeline's images have by default, as far as it says so."""
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = next((value for name in DEFAULT_SIZES if (value := getattr(pipeline, name, None))), None)
    size = size or getattr(getattr(network, "config", None), "sample_size", None)
    if not size:
        return DEFAULT_SIZE, DEFAULT_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    factor = vae_factor(pipeline)
    return int(height) * factor, int(width) * factor


def vae_factor(pipeline: Any) -> int:
    """How many pixels a latent stands for along height or width; 1 without a VAE."""
    return next((int(value) for name in VAE_FACTORS if (value := getattr(pipeline, name, None))), 1)


def _call_of(
    pipeline: Any, arguments: Mapping[str, Any], given: Mapping[str, Any], *, with_images: bool
) -> dict[str, Any]:
    """A call with defaults, and something for each argument without."""
    call: dict[str, Any] = {}
    if "prompt" in arguments:
        call["prompt"] = PROMPT
    for name, facts in arguments.items():
        if facts["type"] == "image" and (with_images or facts["required"]):
            call[name] = _picture(pipeline)
        elif facts["required"]:
            values = {"integers": [0], "numbers": [0.0], "texts": [PROMPT], "images": [_picture(pipeline)] * 2}
            call[name] = {"text": PROMPT, "integer": 0, "number": 0.0, "boolean": False, **values}[facts["type"]]
    strength = arguments.get("strength", {}).get("default") if with_images else None
    call["num_inference_steps"] = math.ceil(NUM_STEPS / strength) if strength else NUM_STEPS
    return {**call, **given}


def _picture(pipeline: Any) -> Image.Image:
    """A picture with all grey values, of the size that the pipeline expects."""
    height, width = image_size(pipeline)
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())


def _images(call: Mapping[str, Any]) -> set[str]:
    return {name for name, value in call.items() if isinstance(value, Image.Image)}


def _try(shared: SharedCalls, call: Mapping[str, Any]) -> Result:
    return shared.run([_request(shared.pipeline, call)])[0]


def _request(pipeline: Any, call: Mapping[str, Any]) -> Request:
    known = inspect.signature(type(pipeline).__call__).parameters
    own = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    own = {name: value for name, value in own.items() if name in known}
    return Request({**own, **call}, copy.deepcopy(pipeline.scheduler))


def _sample_of(pipeline: Any, result: Result) -> tuple[str, Tensor]:
    """Whether a pipeline gives `images` or `frames`, and its first sample: (C, H, W), or (F, C, H, W).

    Raises:
        ModelFormatError: it gives something else, such as sound.
    """
    name, value = next(iter(result.output.items()))
    is_sound = name.startswith("audio")
    try:
        first = value[0]
        array = np.stack([np.asarray(each) for each in first]) if isinstance(first, list) else np.asarray(first)
        sample = torch.as_tensor(array).float()
    except Exception:  # Anything may be in an output.
        is_sound, sample = True, torch.zeros(0)
    if is_sound or sample.ndim not in (3, 4):
        raise _error(pipeline, f"its output is {name!r}; accepted: images, or frames of a video")
    return "images" if sample.ndim == 3 else "frames", sample.movedim(-1, -3)


def _size_multiple(pipeline: Any, shared: SharedCalls, call: Mapping[str, Any]) -> int:
    """The number whose multiples height and width have to be.

    Sizes that a pipeline refuses are tried, up to where it calls its denoiser. Some round a size down without a word:
    their denoiser then gets the input of the size before.
    """
    size = MULTIPLES[-1] * math.ceil(max(image_size(pipeline)) / MULTIPLES[-1])
    patch = getattr(next(iter(shared.networks.values())).config, "patch_size", None)
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    least = vae_factor(pipeline) * (patch if isinstance(patch, int) else 1)
    before = _num_values(shared, call, size)
    accepted = []
    for multiple in MULTIPLES:
        values = _num_values(shared, call, size + multiple)
        if values is not None and values != before:
            return math.lcm(multiple, least)
        if values is not None:
            accepted.append(multiple)
    return math.lcm(min(accepted, default=1), least)


def _is_called(shared: SharedCalls, call: Mapping[str, Any]) -> bool:
    """Whether the pipeline takes a call, up to where it calls its denoiser."""
    try:
        shared.first_call(_request(shared.pipeline, call))
    except Exception:  # The pipeline refuses the call, in its own words.
        return False
    return True


def _num_values(shared: SharedCalls, call: Mapping[str, Any], size: int) -> int | None:
    """How many values the denoiser's first input has for a size; None if the pipeline refuses it."""
    try:
        first = shared.first_call(_request(shared.pipeline, {**call, "height": size, "width": size}))
    except Exception:  # The pipeline refuses the size, in its own words.
        return None
    return sum(leaf.value.numel() for leaf in first.leaves if isinstance(leaf.value, Tensor) and leaf.role == "rows")


def _refuse(pipeline: Any, error: BaseException) -> None:
    if isinstance(error, Exception) and is_out_of_memory(error):
        raise MemoryError(str(error)) from None
    words = " ".join(str(error).split())[:MAX_SHOWN_CHARACTERS] or type(error).__name__
    raise _error(
        pipeline, f"its call with default arguments fails ({words}); accepted: a pipeline that samples"
    ) from None


def _error(pipeline: Any, message: str) -> ModelFormatError:
    return ModelFormatError(MODEL_INDEX, f"{type(pipeline).__name__}: {message}")
