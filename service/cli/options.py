"""Options of several commands. The service has defaults for those that are not given."""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.output import NOT_FOUND, USAGE, CommandError
from service.client.choices import GuidanceType as AnyGuidanceType

if TYPE_CHECKING:
    from service.client import TimeTuner

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model's id or name.")]
NumSteps = Annotated[int, typer.Option(min=1, help="Steps of sampling.")]
SamplerName = Annotated[str | None, typer.Option(help="Such as ddim or dpmpp_2m. [ddim]")]
Clipping = Annotated[
    str | None, typer.Option(help="none, or such as clip_sample_range=1, for samplers that clip. [the model's own]")
]
GuidanceType = Annotated[AnyGuidanceType | None, typer.Option(help="[uncond]")]
GuidanceScale = Annotated[float | None, typer.Option(help="[1]")]


def scale_or_interval(text: str) -> dict[str, Any]:
    """The field of a request that one guidance scale is, or the lowest and the highest of an interval."""
    low, dots, high = text.partition("..")
    try:
        return {"guidance_scales": [float(low), float(high)]} if dots else {"guidance_scale": float(low)}
    except ValueError:
        raise typer.BadParameter(f"{text!r}; accepted: a number, or LOWEST..HIGHEST, such as 1.5..7.5") from None


GuidanceScales = Annotated[
    Any,
    typer.Option(
        "--guidance-scale",
        parser=scale_or_interval,
        metavar="SCALE[..HIGHEST]",
        help="One scale, or an interval such as 1.5..7.5, all of which the schedule then serves. [1]",
    ),
]
GuidanceRescale = Annotated[float | None, typer.Option(help="[0]")]
GuidanceStart = Annotated[float | None, typer.Option(help="No guidance at times below. [0]")]
GuidanceEnd = Annotated[float | None, typer.Option(help="No guidance at times above. [1000]")]
Eta = Annotated[float | None, typer.Option(help="Noise of each step, for ddim. [0]")]


def grid(text: str) -> str | list[float]:
    """A grid's name, or its times."""
    try:
        return [float(time) for time in text.split(",")]
    except ValueError:
        return text


Timesteps = Annotated[
    Any, typer.Option(parser=grid, metavar="GRID", help="A grid's name, or num_steps + 1 times, by commas. [default]")
]


def given(**options: Any) -> Any:
    """The options that were given."""
    return {name: value for name, value in options.items() if value not in (None, [], {})}


def step_counts(text: str) -> list[int]:
    """The numbers of a list such as `4,6,8`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise typer.BadParameter(f"{text!r}; accepted: a number of 1 or more, or several, such as 4,6,8")
    return list(dict.fromkeys(map(int, parts)))


StepCounts = Annotated[
    Any,
    typer.Option(parser=step_counts, metavar="N[,N...]", help="Steps of sampling; of several, each is tuned for."),
]


def assignment(text: str) -> tuple[str, Any]:
    """A field of a request, and its value, which is JSON or text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r}; accepted: NAME=VALUE, such as total_iters=50")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def size(text: str) -> tuple[int, int]:
    """A height and a width."""
    height, times, width = text.partition("x")
    if not (times and height.isdecimal() and width.isdecimal()):
        raise typer.BadParameter(f"{text!r}; accepted: HEIGHTxWIDTH, such as 768x1024")
    return int(height), int(width)


Height = Annotated[int | None, typer.Option(help="Of pipelines, in pixels. [the pipeline's own]")]
Width = Annotated[int | None, typer.Option(help="[the pipeline's own]")]
Sizes = Annotated[
    list[Any],
    typer.Option(
        "--size", parser=size, metavar="HEIGHTxWIDTH", help="Of pipelines: several sizes, each by its own --size."
    ),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What a pipeline's images are not to show.")]
CallArguments = Annotated[
    list[Any],
    typer.Option(
        "--call", parser=assignment, metavar="NAME=VALUE", help="An argument of a pipeline's call; may be repeated."
    ),
]


def image_file(text: str) -> tuple[str, Path]:
    """The name of a call's argument, `image` if none is given, and an image file."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals else ("image", Path(text))


ImageFiles = Annotated[
    list[Any],
    typer.Option(
        "--image",
        parser=image_file,
        metavar="[NAME=]FILE",
        help="A PNG, JPEG or WebP file for an argument of a pipeline's call, `image` or another; may be repeated.",
    ),
]


def call_of(arguments: list[Any], images: list[Any]) -> dict[str, Any]:
    """The `call` of a request. Raises: CommandError, for a file that is no image."""
    return dict(arguments) | {name: data_url(path) for name, path in images}


def data_url(path: Path) -> str:
    """An image file as a data URL. Raises: CommandError."""
    kind = IMAGE_TYPES.get(path.suffix.lower())
    if kind is None:
        raise CommandError(f"--image is {str(path)!r}; accepted: a name that ends with {', '.join(IMAGE_TYPES)}", USAGE)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CommandError(f"--image is {str(path)!r} ({error.strerror}); accepted: a file to be read", USAGE) from None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


IMAGE_TYPES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

Private = Annotated[bool, typer.Option("--private", help="Only your API key, and admins, see it.")]


def find_model(client: "TimeTuner", name: str) -> str:
    """The id of a model, which is given by its id or its name. The newest of a name counts. Raises: CommandError."""
    if name.startswith("mdl_"):
        return name
    for model in client.models.list(limit=200):
        if model.name == name:
            return model.id
    accepted = "an id or a name of `timetuner models list`; a built-in model after `timetuner models import NAME`"
    raise CommandError(f"no model {name!r}; accepted: {accepted}", NOT_FOUND)
