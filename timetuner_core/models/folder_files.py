"""Reading a model folder's JSON and its safetensors files' headers, without PyTorch; nothing is unpickled."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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
MAX_HEADER_BYTES = 2**22  # of a safetensors file; that of a network of billions of parameters is a tenth of this
MAX_TENSORS = 20_000
LENGTH_BYTES = 8  # a safetensors file begins with its header's length
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")

# What the safetensors library raises for files that are none, or of dtypes that torch does not have.
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError)


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
    check_header(path, name)
    try:
        with safe_open(path / name, framework="numpy") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise not_whole(name, error) from None
    for key, tensor in slices.items():
        if tensor.get_dtype() not in WEIGHT_DTYPES:
            message = f"tensor {key!r} has dtype {tensor.get_dtype()}; accepted: {', '.join(WEIGHT_DTYPES)}"
            raise ModelFormatError(name, message)
    return {key: tuple(tensor.get_shape()) for key, tensor in slices.items()}


def check_files(path: Path) -> None:
    """Refuse a folder whose JSON or safetensors headers cannot be read. What they say is looked at by `load_folder`.

    Raises:
        ModelFormatError: names the file.
    """
    for name in MODEL_FILES:
        if not (path / name).exists():
            continue
        if name.endswith(".json"):
            read_json(path, name)
        else:
            check_header(path, name)


def check_header(path: Path, name: str) -> None:
    """Refuse a header, and a number of tensors, that would be a burden just to read. Raises: ModelFormatError."""
    with (path / name).open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise not_whole(name, f"a header of {length} bytes; accepted: up to {MAX_HEADER_BYTES}")
        count = file.read(length).count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise ModelFormatError(name, f"it has {count} tensors; accepted: up to {MAX_TENSORS}")


def not_whole(name: str, error: Exception | str) -> ModelFormatError:
    """The error for a file that is not a whole safetensors file, and why."""
    return ModelFormatError(name, f"not a whole safetensors file ({error})")
