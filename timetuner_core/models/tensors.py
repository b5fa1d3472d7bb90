"""Reading the tensors of a model folder's safetensors files."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from timetuner_core.models.folder_files import UNREADABLE, ModelFormatError, check_header, not_whole


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises: ModelFormatError."""
    check_header(path, name)
    try:
        return load_file(path / name)
    except UNREADABLE as error:
        raise not_whole(name, error) from None


def dtype_name(dtype: torch.dtype) -> str:
    """A type's name, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Raises: ModelFormatError."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFormatError(name, f"tensor {key!r} has NaN or infinite values; accepted: finite ones")
