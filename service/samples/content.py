"""Content negotiation: the format of the images that a request accepts."""

from decimal import Decimal

from service.http.errors import NotAcceptableError
from service.shared.image_formats import FORMATS

ANY_TYPE = {"*/*": "image/png", "image/*": "image/png", "application/*": "application/x-npy"}


def negotiate(accept: str, image_shape: list[int]) -> str:
    """The first acceptable format of an Accept header. Raises: NotAcceptableError."""
    is_image = len(image_shape) == 3 and image_shape[0] in (1, 3)
    formats = [name for name in FORMATS if is_image or name in ("application/x-npy", "application/json")]
    ranges = [part.partition(";") for part in accept.split(",")]
    weighted = sorted(ranges, key=lambda part: -_quality(part[2]))
    for media_range, _, parameters in weighted:
        name = media_range.strip().lower()
        if name == "*/*" and not is_image:
            return "application/x-npy"
        name = ANY_TYPE.get(name, name)
        if name in formats and _quality(parameters) > 0:
            return name
    raise NotAcceptableError(
        f"Accept is {accept!r}; accepted for this model: {', '.join(formats)}", ("header", "Accept"), accept
    )


def _quality(parameters: str) -> Decimal:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = Decimal(value.strip())
            except ArithmeticError:
                return Decimal(0)
            return quality if quality.is_finite() else Decimal(0)
    return Decimal(1)
