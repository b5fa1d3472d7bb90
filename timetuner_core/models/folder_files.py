"""Reading a model folder's files: JSON and safetensors, never a pickle, and checked before use."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

UNET_CONFIG = "unet/config.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TRANSFORMER_CONFIG = "transformer/config.json"
TRANSFORMER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
VAE_CONFIG = "vae/config.json"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
METADATA = "timetuner.json"
DATA = "data.safetensors"
MODEL_FILES = (
    UNET_CONFIG,
    UNET_WEIGHTS,
    SCHEDULER_CONFIG,
    METADATA,
    DATA,
    TRANSFORMER_CONFIG,
    TRANSFORMER_WEIGHTS,
    VAE_CONFIG,
    VAE_WEIGHTS,
)

Shape = tuple[int, ...]

MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 20
MAX_HEADER_BYTES = 2**22  # A network of billions of parameters has a safetensors header of a tenth of this.
MAX_TENSORS = 20_000
LENGTH_BYTES = 8  # A safetensors file begins with its header's length.
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")

# The safetensors library raises these for other files, and for dtypes that PyTorch does not have.
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError)


class ModelFormatError(ValueError):
    """A model folder that cannot be used: which file or key is at fault, and what is accepted."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object. Raises: ModelFormatError."""
    try:
        if (path / name).stat().st_size > MAX_JSON_BYTES:
            raise ModelFormatError(name, f"the file is too large; accepted: up to {MAX_JSON_BYTES} bytes")
        text = (path / name).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_unambiguous)
    except FileNotFoundError:
        raise ModelFormatError(name, "the file is missing; a diffusers-format folder has it") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFormatError):
            raise
        raise ModelFormatError(name, f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelFormatError(name, "accepted: a JSON object")
    if _is_deeper(content, MAX_JSON_DEPTH):
        raise ModelFormatError(name, f"nested too deeply; accepted: up to {MAX_JSON_DEPTH} levels")
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError, if a key comes twice: readers differ in which value they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return content


def _is_deeper(content: Any, depth: int) -> bool:
    level = [content]
    for _ in range(depth):
        children = [list(node.values()) if isinstance(node, dict) else node for node in level]
        level = [child for nodes in children for child in nodes if isinstance(child, dict | list)]
    return bool(level)


def read_shapes(path: Path, name: str) -> dict[str, Shape]:
    """The names and shapes of the weights in a safetensors file, from its header. Raises: ModelFormatError."""
    if not (path / name).exists():
        raise ModelFormatError(name, "the file is missing; weights are accepted as safetensors only")
    _check_header(path, name)
    try:
        with safe_open(path / name, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
    except _UNREADABLE as error:
        raise _not_whole(name, error) from None
    for key, tensor in slices.items():
        if tensor.get_dtype() not in WEIGHT_DTYPES:
            message = f"tensor {key!r} has dtype {tensor.get_dtype()}; accepted: {', '.join(WEIGHT_DTYPES)}"
            raise ModelFormatError(name, message)
    return {key: tuple(tensor.get_shape()) for key, tensor in slices.items()}


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises: ModelFormatError."""
    _check_header(path, name)
    try:
        return load_file(path / name)
    except _UNREADABLE as error:
        raise _not_whole(name, error) from None


def _check_header(path: Path, name: str) -> None:
    """Refuse a header, and a number of tensors, that would be a burden just to read."""
    with (path / name).open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise _not_whole(name, f"a header of {length} bytes; accepted: up to {MAX_HEADER_BYTES}")
        count = file.read(length).count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise ModelFormatError(name, f"it has {count} tensors; accepted: up to {MAX_TENSORS}")


def check_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Raises: ModelFormatError."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFormatError(name, f"tensor {key!r} has NaN or infinite values; accepted: finite ones")


def _not_whole(name: str, error: Exception | str) -> ModelFormatError:
    return ModelFormatError(name, f"not a whole safetensors file ({error})")
