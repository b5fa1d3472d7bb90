"""Samples as bytes, in every format we send them in."""

import base64
import io
import json
import math
import zipfile
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PREVIEW_PIXELS = 256  # a preview's side, at most

Images: TypeAlias = NDArray[np.float32]


def to_images(images: Images) -> list[Image.Image]:
    """Each at its own size."""
    return [_image(pixels) for pixels in _pixels(images)]


def to_npy(images: Images) -> bytes:
    """The raw samples, float32 `(num_images, *image_shape)`, in numpy's own format."""
    buffer = io.BytesIO()
    np.save(buffer, images, allow_pickle=False)
    return buffer.getvalue()


def to_png_grid(images: Images) -> bytes:
    """All images in one, row by row, at least 64 pixels wide each."""
    pixels = _pixels(images)
    columns = math.ceil(math.sqrt(len(pixels)))
    height, width = pixels.shape[1:3]
    scale = max(1, math.ceil(64 / width))
    sheet = Image.new(
        _mode(pixels), (columns * (width * scale + 2) - 2, math.ceil(len(pixels) / columns) * (height * scale + 2) - 2)
    )
    for k, image in enumerate(pixels):
        row, column = divmod(k, columns)
        tile = _image(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (column * (width * scale + 2), row * (height * scale + 2)))
    return _png(sheet)


def to_png_zip(images: Images) -> bytes:
    """One PNG per image, at its own size: `000.png`, `001.png`, ..."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for k, image in enumerate(to_images(images)):
            archive.writestr(f"{k:03d}.png", _png(image))
    return buffer.getvalue()


def to_json(images: Images) -> bytes:
    """`{"images": [base64 PNG, ...]}`; samples that are no images come as numbers, `{"samples": [...]}`."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return json.dumps({"samples": images.tolist()}).encode()
    encoded = [base64.b64encode(_png(image)).decode() for image in to_images(images)]
    return json.dumps({"images": encoded}).encode()


FORMATS: dict[str, Callable[[Images], bytes]] = {
    "image/png": to_png_grid,
    "application/zip": to_png_zip,
    "application/x-npy": to_npy,
    "application/json": to_json,
}


def to_preview(images: Images) -> bytes | None:
    """A small sheet of PNGs; None of samples that are no images."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return None
    stride = math.ceil(max(images.shape[2:]) / PREVIEW_PIXELS)
    return to_png_grid(images[:, :, ::stride, ::stride])


def _pixels(images: Images) -> NDArray[np.uint8]:
    """`(B, C, H, W)` in -1..1 to `(B, H, W, C)` in 0..255."""
    scaled = (np.clip(images, -1, 1) + 1) * 127.5
    return np.round(scaled).astype(np.uint8).transpose(0, 2, 3, 1)


def _mode(pixels: NDArray[np.uint8]) -> str:
    return "L" if pixels.shape[-1] == 1 else "RGB"


def _image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
