"""The data that comes with a model, for tuning and for measuring distances to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from timetuner_core.models.folder_files import DATA, METADATA, ModelFormatError, Shape, read_json
from timetuner_core.models.tensors import read_tensors

RANGE_TOLERANCE = 1e-3  # Resizing and half precision leave values a little beyond -1 and 1.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ModelData:
    """The content of `data.safetensors`, each None if it is not there.

    Attributes:
        images: float32 in the network's range (-1..1), `(P, *image_shape)`.
        conditions: class labels `(P,)` or tensors `(P, L, D)`, a row per image if there are images.
        uncond_condition: the tensor that stands for "no condition", `(1, L, D)`.
    """

    images: Tensor | None = None
    conditions: Tensor | None = None
    uncond_condition: Tensor | None = None

    def draw(
        self, encode: Callable[[Tensor], Tensor], num_samples: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """x0 `(num_samples, *sample_shape)` and their conditions, with replacement."""
        assert self.images is not None
        index = torch.randint(len(self.images), (num_samples,), generator=generator)
        x0 = torch.cat([encode(images).cpu() for images in torch.split(self.images[index], 64)])
        return x0, None if self.conditions is None else self.conditions[index]


def read_data(path: Path, image_shape: Shape, num_classes: int, condition_dim: int | None) -> ModelData:
    """Read `data.safetensors`, if there is one. Raises: ModelFormatError."""
    if not (path / DATA).exists():
        return ModelData()
    tensors = read_tensors(path, DATA)
    images = None
    if condition_dim is None or "images" in tensors:
        images = _images(tensors.get("images"), image_shape)
    if condition_dim is not None:
        return _with_conditions(tensors, images, condition_dim)
    return ModelData(images, _labels(tensors.get("labels"), images, num_classes) if num_classes > 0 else None)


def read_null_class(path: Path, num_embeddings: int) -> int | None:
    """`null_class_label` in `timetuner.json`, if there is one. Raises: ModelFormatError."""
    if not (path / METADATA).exists():
        return None
    label = read_json(path, METADATA).get("null_class_label")
    if label is None:
        return None
    if not isinstance(label, int) or isinstance(label, bool) or label != num_embeddings - 1 or num_embeddings < 2:
        accepted = f"null or {num_embeddings - 1}, the last class embedding" if num_embeddings > 1 else "null"
        raise ModelFormatError(METADATA, f"null_class_label is {label!r}; accepted: {accepted}")
    return label


def _images(images: Tensor | None, image_shape: Shape) -> Tensor:
    if images is None or tuple(images.shape[1:]) != image_shape or len(images) < 2:
        given = "none" if images is None else f"shape {tuple(images.shape)}"
        accepted = f"shape (P, {', '.join(map(str, image_shape))}) with P of 2 or more"
        raise ModelFormatError(DATA, f"tensor 'images': {given}; accepted: {accepted}")
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1
    if images.dtype != torch.float32 or not bool(torch.isfinite(images).all()):
        raise ModelFormatError(DATA, "tensor 'images': accepted: uint8, or finite float32")
    low, high = images.aminmax()
    if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        message = f"tensor 'images': values from {float(low):.6g} to {float(high):.6g}"
        raise ModelFormatError(DATA, f"{message}; accepted: float32 in -1..1, or uint8 in 0..255")
    return images


def _labels(labels: Tensor | None, images: Tensor | None, num_classes: int) -> Tensor:
    assert images is not None
    if labels is None or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ModelFormatError(DATA, f"tensor 'labels': accepted: int64 of shape ({len(images)},)")
    if not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ModelFormatError(DATA, f"tensor 'labels': accepted: values in 0..{num_classes - 1}")
    return labels


def _with_conditions(tensors: dict[str, Tensor], images: Tensor | None, condition_dim: int) -> ModelData:
    conditions, uncond_condition = tensors.get("conditions"), tensors.get("uncond_condition")
    if images is not None and (conditions is None or conditions.shape[:1] != images.shape[:1]):
        raise ModelFormatError(DATA, f"tensor 'conditions': accepted: one row for each of {len(images)} images")
    for name, tensor, rows in (("conditions", conditions, "P"), ("uncond_condition", uncond_condition, "1")):
        if tensor is None:
            continue
        fits = tensor.ndim == 3 and tensor.shape[2] == condition_dim and tensor.numel() > 0
        if not fits or (rows == "1" and len(tensor) != 1):
            accepted = f"shape ({rows}, L, {condition_dim})"
            raise ModelFormatError(DATA, f"tensor {name!r}: shape {tuple(tensor.shape)}; accepted: {accepted}")
        if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
            raise ModelFormatError(DATA, f"tensor {name!r}: accepted: finite floating-point values")
    if conditions is not None and uncond_condition is not None and conditions.shape[1] != uncond_condition.shape[1]:
        raise ModelFormatError(DATA, "tensors 'conditions' and 'uncond_condition': accepted: the same length L")
    as_float = (None if tensor is None else tensor.float() for tensor in (conditions, uncond_condition))
    return ModelData(images, *as_float)
