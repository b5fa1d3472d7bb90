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


class ModelFormatError(ValueError):
    """A model folder that cannot be used: which file or key is at fault, and what is accepted."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object. Raises: ModelFormatError."""
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFormatError(name, "the file is missing; a diffusers-format folder has it") from None
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(name, f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelFormatError(name, "accepted: a JSON object")
    return content


def read_shapes(path: Path, name: str) -> dict[str, Shape]:
    """The names and shapes of the tensors in a safetensors file, from its header. Raises: ModelFormatError."""
    if not (path / name).exists():
        raise ModelFormatError(name, "the file is missing; weights are accepted as safetensors only")
    try:
        with safe_open(path / name, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_whole(name, error) from None


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises: ModelFormatError."""
    try:
        return load_file(path / name)
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_whole(name, error) from None


def check_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Raises: ModelFormatError."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFormatError(name, f"tensor {key!r} has NaN or infinite values; accepted: finite ones")


def _not_whole(name: str, error: Exception) -> ModelFormatError:
    return ModelFormatError(name, f"not a whole safetensors file ({error})")
