"""The arguments of a pipeline's own call that requests give: their types, their defaults, and what tells them apart.

The model's `spec["call"]` has each argument by name: `{"type": ..., "default": ..., "required": ...}`.
"""

import base64
import binascii
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from PIL import ExifTags, Image, ImageOps

MAX_TEXT = 8_000  # characters
MAX_ITEMS = 1_000
MAX_NUMBER = 2**31
MAX_IMAGE_BYTES = 16 * 2**20
MAX_IMAGE_PIXELS = 2**24
QUARTER_TURNS = (5, 6, 7, 8)  # Orientations of EXIF in which a picture is stored on its side.
DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,")
IMAGE = f"a data URL of a PNG, JPEG or WebP image of up to {MAX_IMAGE_BYTES >> 20} MiB and {MAX_IMAGE_PIXELS} pixels"
DEFAULT_NUM_STEPS = 50

INTERVAL = "sizes:"  # Keys of calls with an interval of sizes begin so.
SIZES = ("height", "width")
# Requests have fields of their own for these arguments of a call.
FIELDS = ("prompt", "negative_prompt", "height", "width", "guidance_scale")
# Arguments that are images of one channel.
MASKS = ("mask_image",)


class ArgumentError(ValueError):
    """An argument that a pipeline's call does not take so. name: the argument; value: None if it is not to be shown."""

    def __init__(self, name: str, problem: str, accepted: str, value: Any = None) -> None:
        self.name, self.value = name, value
        super().__init__(f"call.{name[:100]} {problem}; accepted: {accepted}")


def is_pipeline(spec: Mapping[str, Any]) -> bool:
    """Whether a model's `spec` is of a whole pipeline, and not of a network."""
    return spec.get("kind") == "pipeline"


def plain_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments that JSON and databases take: texts, finite numbers, booleans, null, and lists of these.

    Raises:
        ValueError: what is accepted.
    """
    if len(call) > MAX_ITEMS or not all(map(_is_plain, (*call, *call.values()))):
        raise ValueError("accepted: arguments that are texts, finite numbers, booleans, or lists of these")
    return call


def _is_plain(value: Any, depth: int = 1) -> bool:
    if isinstance(value, list):
        return depth > 0 and len(value) <= MAX_ITEMS and all(_is_plain(each, depth - 1) for each in value)
    if isinstance(value, str):
        return value.encode(errors="replace").decode() == value  # Half of a surrogate pair has no UTF-8.
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= MAX_NUMBER)


def check_arguments(spec: Mapping[str, Any], call: Mapping[str, Any], *, is_complete: bool = True) -> dict[str, Any]:
    """A request's `call` with each argument as its type has it, without those that are the call's own defaults.

    Args:
        is_complete: refuse a call without an argument that is required.

    Raises:
        ArgumentError: one that the call does not take, of another type, or missing.
    """
    known: dict[str, Any] = {name: each for name, each in spec["call"].items() if name not in FIELDS}
    checked = {}
    for name, value in call.items():
        if name in FIELDS:
            raise ArgumentError(name, "is a field of its own", f"{name} beside call")
        if name not in known:
            raise ArgumentError(name, "is no argument of this pipeline", ", ".join(sorted(known)) or "none")
        kind, default = known[name]["type"], known[name].get("default")
        if value is None and default is None and not known[name].get("required"):
            continue
        try:
            read = _READERS[kind](value)
        except ValueError as error:
            is_short = value is None or isinstance(value, bool | int | float)
            problem = f"is {value!r}" if is_short else f"is a {type(value).__name__}"
            raise ArgumentError(name, problem, str(error), value if is_short else None) from None
        if read != default or known[name].get("required"):
            checked[name] = read
    for name, each in known.items():
        if is_complete and each.get("required") and name not in checked:
            raise ArgumentError(name, "is missing", _ACCEPTED[each["type"]])
    if "strength" in checked and not 0 < checked["strength"] <= 1:
        raise ArgumentError("strength", f"is {checked['strength']:g}", "above 0, up to 1", checked["strength"])
    return checked


def call_key(deciding: Mapping[str, Any]) -> str:
    """A digest of what `deciding_arguments` gives, which begins with `INTERVAL` if a size is one. Empty of nothing."""
    if not deciding:
        return ""
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:32]
    return INTERVAL + digest if any(isinstance(deciding.get(name), list) for name in SIZES) else digest


def deciding_arguments(height: int | None, width: int | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that change latents and are no content, by name, and its sizes.

    Texts and images are content. The size of an image counts where it decides the size of the result.

    Args:
        call: arguments as `check_arguments` gives them.
    """
    sizes: dict[str, Any] = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    if len(sizes) < 2 and (found := image_sizes(call)):
        sizes["image_sizes"] = found
    return sizes | {name: value for name, value in sorted(call.items()) if not _is_content(value)}


def size_intervals(sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Height and width of several sizes, each as [smallest, largest]; one that all share is a number."""
    bounds = {name: [min(each), max(each)] for name, each in zip(SIZES, zip(*sizes, strict=True), strict=True)}
    return {name: low if low == high else [low, high] for name, (low, high) in bounds.items()}


def sizes_of_import(call: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an import that stand for the sizes of a schedule's `call`: `sizes` if one is an interval.

    `image_sizes` stands for images that decided the size.
    """
    sizes = {name: call[name] for name in SIZES if name in call}
    if not any(isinstance(size, list) for size in sizes.values()):
        return sizes | {name: value for name, value in call.items() if name == "image_sizes"}
    corners = [size if isinstance(size, list) else [size, size] for size in (sizes[name] for name in SIZES)]
    return {"sizes": [list(corner) for corner in zip(*corners, strict=True)]}


def covers(tuned: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a schedule that was tuned for some deciding arguments, maybe for intervals of sizes, serves others."""
    return tuned.keys() == wanted.keys() and all(covers_value(tuned[name], wanted[name]) for name in tuned)


def covers_value(tuned: Any, wanted: Any) -> bool:
    """Whether one value is the other, or a number within its interval."""
    if isinstance(tuned, list) and isinstance(wanted, int | Decimal):
        return len(tuned) == 2 and bool(tuned[0] <= wanted <= tuned[1])
    return bool(tuned == wanted)


def image_sizes(call: Mapping[str, Any]) -> list[list[int]]:
    """Width and height of each image of a call, by the arguments' names."""
    sizes = []
    for _, value in sorted(call.items()):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and DATA_URL.match(each):
                try:
                    image = _opened(each)
                    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in QUARTER_TURNS
                    sizes.append([*(image.size[::-1] if is_turned else image.size)])
                except ValueError:  # It is a text that begins like an image.
                    continue
    return sizes


def output_shape(spec: Mapping[str, Any], height: int | None, width: int | None, call: Mapping[str, Any]) -> list[int]:
    """The shape of one sample: (C, H, W), or (F, C, H, W) of frames. Sizes that images decide are estimates."""
    *first, channels, default_height, default_width = spec["image_shape"]
    given = image_sizes(call) if None in (height, width) else []
    rows = height or max([default_height, *(size[1] for size in given)])
    columns = width or max([default_width, *(size[0] for size in given)])
    if spec.get("output") == "frames":
        first = [call.get("num_frames") or spec["call"].get("num_frames", {}).get("default") or first[0]]
    return [*first, channels, rows, columns]


def decode_image(text: str, name: str) -> Image.Image:
    """The image of a data URL: RGB, or one channel for a mask.

    Raises:
        ValueError: what is accepted.
    """
    image = _opened(text)
    try:
        return ImageOps.exif_transpose(image).convert("L" if name in MASKS else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(IMAGE) from None


def decode_images(spec: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, with images in place of their data URLs."""
    decoded = dict(call)
    for name, value in call.items():
        kind = spec["call"][name]["type"]
        if kind == "image":
            decoded[name] = decode_image(value, name)
        elif kind == "images":
            decoded[name] = [decode_image(each, name) for each in value]
    return decoded


def _opened(text: str) -> Image.Image:
    """An image of which only the header is read. Raises: ValueError, what is accepted."""
    match = DATA_URL.match(text)
    if match is None or len(text) > MAX_IMAGE_BYTES * 4 // 3 + 64:
        raise ValueError(IMAGE)
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text[match.end() :], validate=True)), formats=_FORMATS)
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError):
        raise ValueError(IMAGE) from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(IMAGE)
    return image


_FORMATS = ("PNG", "JPEG", "WEBP")


def _is_content(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and any(isinstance(each, str) for each in value))


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(_ACCEPTED["text"])
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_NUMBER:
        raise ValueError(_ACCEPTED["integer"])
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(_ACCEPTED["number"])
    if not math.isfinite(value) or abs(value) > MAX_NUMBER:
        raise ValueError(_ACCEPTED["number"])
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(_ACCEPTED["boolean"])
    return value


def _image(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(IMAGE)
    decode_image(value, "")
    return value


def _several(read: Callable[[Any], Any], kind: str) -> Callable[[Any], list[Any]]:
    def read_all(value: Any) -> list[Any]:
        least = 1 if kind == "images" else 0
        if not isinstance(value, list) or not least <= len(value) <= MAX_ITEMS:
            raise ValueError(_ACCEPTED[kind])
        return [read(each) for each in value]

    return read_all


_ACCEPTED = {
    "text": f"a text of up to {MAX_TEXT} characters",
    "integer": "a whole number",
    "number": "a finite number",
    "boolean": "true or false",
    "image": IMAGE,
    "images": "a list of data URLs of PNG, JPEG or WebP images",
    "integers": "a list of whole numbers",
    "numbers": "a list of finite numbers",
    "texts": "a list of texts",
}
_READERS: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "image": _image,
    "images": _several(_image, "images"),
    "integers": _several(_integer, "integers"),
    "numbers": _several(_number, "numbers"),
    "texts": _several(_text, "texts"),
}
