"""Options of several commands. The service has defaults for those that are not given."""

import base64
import json
import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.completion import complete_grids, complete_models, complete_samplers
from service.cli.output import NOT_FOUND, SHORT_LENGTH, USAGE, CommandError, only_one
from service.client.choices import GRIDS, SAMPLERS, UnreadyState
from service.client.choices import GuidanceType as AnyGuidanceType

if TYPE_CHECKING:
    from service.client import TimeTuner

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's id or name.", autocompletion=complete_models)
]
OfModel = Annotated[str | None, typer.Option(help="A model's id or name.", autocompletion=complete_models)]
NumSteps = Annotated[int, typer.Option(min=1, help="Steps of sampling.")]
SamplerName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"{', '.join(SAMPLERS)}, or one of a package that the service has. [ddim]",
        autocompletion=complete_samplers,
    ),
]
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


SHORT_ID = re.compile(f"(mdl|job|sch|smp)_([0-9A-Z]{{{SHORT_LENGTH}}})")
MAX_NAMED = 1000  # Tables have the names of so many models, and the ids of others.
MAX_LOOKED_AT = 5000  # The newest jobs among which the one of a short id is looked for.


def grid(text: str) -> str | list[float]:
    """A grid's name, or its times."""
    try:
        return [float(time) for time in text.split(",")]
    except ValueError:
        return text


Timesteps = Annotated[
    Any,
    typer.Option(
        parser=grid,
        metavar="GRID",
        help=f"{', '.join(GRIDS)}; or num_steps + 1 falling times, by commas. [default]",
        autocompletion=complete_grids,
    ),
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
        return whole_id(client, name)
    for model in client.models.list(search=name, limit=200):
        if model.name == name:
            return model.id
    accepted = "an id or a name of `timetuner models list`; a built-in model after `timetuner models import NAME`"
    raise CommandError(f"no model {name!r}; accepted: {accepted}", NOT_FOUND)


def model_names(client: "TimeTuner") -> dict[str, str]:
    """The names of the newest models, by their ids."""
    return {model.id: model.name for model in islice(client.models.list(limit=200), MAX_NAMED)}


def whole_id(client: "TimeTuner", id: str) -> str:
    """The id that a short one of a table stands for; any other text as it is.

    Raises: CommandError, if no id among those looked at has this end, or several do.
    """
    match = SHORT_ID.fullmatch(id)
    if match is None:
        return id
    end = match[2]
    listed: Iterable[Any]
    match match[1]:
        case "mdl":
            states: tuple[UnreadyState, ...] = ("queued", "running", "refused")
            unready = (client.models.registrations(state=state) for state in states)
            listed = chain(client.models.list(search=end, limit=200), *unready)
        case "sch":
            listed = client.schedules.list(search=end, limit=200)
        case kind:
            listed = (client.samples if kind == "smp" else client.tuning_jobs).list(limit=200)
    whole = only_one(id, [one.id for one in islice(listed, MAX_LOOKED_AT) if one.id.endswith(end)])
    if whole is not None:
        return whole
    raise CommandError(f"no id ends like {id!r}, of the newest {MAX_LOOKED_AT}; accepted: a whole id", NOT_FOUND)
