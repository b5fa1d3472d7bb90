"""`timetuner sample`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.connection import Url, connected
from service.cli.options import (
    CallArguments,
    Clipping,
    Eta,
    GuidanceEnd,
    GuidanceRescale,
    GuidanceScale,
    GuidanceStart,
    GuidanceType,
    Height,
    ImageFiles,
    ModelName,
    NegativePrompt,
    SamplerName,
    Timesteps,
    Width,
    call_of,
    find_model,
    given,
    whole_id,
)
from service.cli.output import USAGE, AsJson, CommandError, print_json, stderr

if TYPE_CHECKING:
    from service.client import Samples

SUFFIXES = (".png", ".npy", ".zip")


def sample(
    model: ModelName,
    num_steps: Annotated[int | None, typer.Option(min=1, help="Steps of sampling; a pipeline has a default.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What a pipeline's images are to show.")] = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    call: CallArguments = [],  # noqa: B006
    image: ImageFiles = [],  # noqa: B006
    num_images: Annotated[int | None, typer.Option(min=1, help="How many. [16; with a prompt, 1]")] = None,
    seed: Annotated[int | None, typer.Option(help="Image k is drawn from seed + k. [0]")] = None,
    schedule: Annotated[str | None, typer.Option(help="auto, none, a schedule's id or alias. [auto]")] = None,
    sampler: SamplerName = None,
    clipping: Clipping = None,
    guidance_type: GuidanceType = None,
    guidance_scale: GuidanceScale = None,
    guidance_rescale: GuidanceRescale = None,
    guidance_start: GuidanceStart = None,
    guidance_end: GuidanceEnd = None,
    eta: Eta = None,
    timesteps: Timesteps = None,
    class_label: Annotated[
        list[int], typer.Option(help="The label of all images; repeated, one label for each. [drawn at random]")
    ] = [],  # noqa: B006
    out: Annotated[
        Path, typer.Option(help="A .png of all images, a .zip of one each, or a .npy of the numbers.")
    ] = Path("samples.png"),
    show: Annotated[
        bool | None,
        typer.Option("--show/--no-show", help="Show the images in the terminal. [if it is one, without --json]"),
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Sample images, write them into a file, and show them in the terminal."""
    if out.suffix not in SUFFIXES:
        raise CommandError(f"--out is {str(out)!r}; accepted: a name that ends with {', '.join(SUFFIXES)}", USAGE)
    request = given(
        num_steps=num_steps,
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        call=call_of(call, image),
        num_images=num_images or (16 if prompt is None else 1),
        seed=seed,
        schedule=schedule,
        sampler=sampler,
        clipping=clipping,
        guidance_type=guidance_type,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
        eta=eta,
        timesteps=timesteps,
        class_labels=class_label[0] if len(class_label) == 1 else class_label,
    )
    with connected(url) as client, stderr.status("sampling"):
        if schedule is not None:
            request["schedule"] = whole_id(client, schedule)
        samples = client.samples.create(model=find_model(client, model), **request)
    _write(samples, out)
    if as_json:
        told = {"out": str(out), "job": samples.job, "schedule": samples.schedule, "shape": samples.array.shape}
        print_json(told | {"flagged": list(samples.flagged)})
        return
    from rich.console import Console

    if samples.are_images and (Console().is_terminal if show is None else show):
        from service.cli.terminal import show_png

        show_png(samples.to_png())
    typer.echo(f"{out}: {samples.schedule or 'untuned'}")
    if samples.flagged:
        stderr.print(f"the safety checker held back: {', '.join(map(str, samples.flagged))}")


def _write(samples: "Samples", out: Path) -> None:
    from service.shared.image_formats import to_npy, to_png_zip

    if out.suffix == ".npy":
        out.write_bytes(to_npy(samples.array.astype("float32")))
        return
    if not samples.are_images:
        raise CommandError(f"--out is {str(out)!r}; accepted for this model, whose samples are no images: .npy", USAGE)
    out.write_bytes(samples.to_png() if out.suffix == ".png" else to_png_zip(samples.array))
