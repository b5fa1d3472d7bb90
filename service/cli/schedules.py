"""`timetuner schedules`"""

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.completion import complete_models, complete_samplers
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
    ModelName,
    NumSteps,
    OfModel,
    Private,
    SamplerName,
    Width,
    find_model,
    given,
    model_names,
    whole_id,
)
from service.cli.output import USAGE, AsJson, CommandError, Limit, print_facts, print_json, print_table
from service.client.choices import SAMPLERS, ExportFormat, ScheduleSort, ScheduleStatus
from service.client.choices import GuidanceType as AnyGuidanceType

if TYPE_CHECKING:
    from service.client import Schedule

schedules = typer.Typer(no_args_is_help=True, help="List, move and name schedules.")

ScheduleId = Annotated[str, typer.Argument(metavar="ID", help="A schedule's id, whole or short.")]


@schedules.command(name="list")
def list_(
    model: OfModel = None,
    num_steps: Annotated[int | None, typer.Option(min=1)] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="NAME", help=", ".join(SAMPLERS), autocompletion=complete_samplers)
    ] = None,
    clipping: Clipping = None,
    guidance_type: Annotated[AnyGuidanceType | None, typer.Option()] = None,
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    status: Annotated[ScheduleStatus | None, typer.Option()] = None,
    search: Annotated[str | None, typer.Option(help="A part of the id, of an alias or of the model's name.")] = None,
    sort: Annotated[ScheduleSort, typer.Option(help="The order; score leaves out imported schedules.")] = "newest",
    limit: Limit = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List schedules that match all filters, newest first."""
    filters = given(
        num_steps=num_steps,
        sampler=sampler,
        clipping=clipping,
        guidance_type=guidance_type,
        guidance_scale=guidance_scale,
        status=status,
        search=search,
        sort=sort,
    )
    with connected(url) as client:
        if model is not None:
            filters["model"] = find_model(client, model)
        found = list(islice(client.schedules.list(**filters), limit))
        names = {} if as_json else model_names(client)
    if as_json:
        print_json(found)
        return
    columns = ("id", "model", "steps", "sampler", "guidance", "verdict", "score", "made")
    rows = (
        (s.id, names.get(s.model, s.model), s.num_steps, s.sampler, _guidance(s), verdict_of(s), s.score, s.created_at)
        for s in found
    )
    print_table(columns, rows)


@schedules.command()
def show(schedule_id: ScheduleId, url: Url = None, as_json: AsJson = False) -> None:
    """Show one schedule and its evaluation."""
    with connected(url) as client:
        schedule = client.schedules.get(whole_id(client, schedule_id))
    if as_json:
        print_json(schedule)
    else:
        show_schedule(schedule)


@schedules.command()
def rm(schedule_id: ScheduleId, url: Url = None, as_json: AsJson = False) -> None:
    """Delete a schedule that has no alias, and that no stored samples were made with."""
    with connected(url) as client:
        schedule_id = whole_id(client, schedule_id)
        client.schedules.delete(schedule_id)
    if as_json:
        print_json({"deleted": schedule_id})
    else:
        typer.echo(schedule_id)


@schedules.command()
def resolve(
    model: ModelName,
    num_steps: NumSteps,
    sampler: SamplerName = None,
    clipping: Clipping = None,
    guidance_type: GuidanceType = None,
    guidance_scale: GuidanceScale = None,
    guidance_rescale: GuidanceRescale = None,
    guidance_start: GuidanceStart = None,
    guidance_end: GuidanceEnd = None,
    eta: Eta = None,
    height: Height = None,
    width: Width = None,
    call: CallArguments = [],  # noqa: B006
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show the schedule that sampling would use, and why."""
    setting = given(
        height=height,
        width=width,
        call=dict(call),
        num_steps=num_steps,
        sampler=sampler,
        clipping=clipping,
        guidance_type=guidance_type,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
        eta=eta,
    )
    with connected(url) as client:
        resolution = client.schedules.resolve(model=find_model(client, model), **setting)
    if as_json:
        print_json(resolution)
        return
    typer.echo(resolution.reason)
    if resolution.schedule is not None:
        show_schedule(resolution.schedule)


@schedules.command()
def export(
    schedule_id: ScheduleId,
    format: Annotated[
        ExportFormat, typer.Option(help="json is what `import` reads; the others are for other programs.")
    ] = "json",
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Export the grid although ratios or a learned solver are lost.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "--output", help="A file. [stdout]")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Write a schedule as `import` reads it, or for another program."""
    if format == "diffusers" and out is None:
        raise CommandError("a zip file cannot be printed; accepted: --out FILE", USAGE)
    with connected(url) as client:
        exported = client.schedules.export(whole_id(client, schedule_id), format, lossy=lossy)
    if out is None:
        typer.echo(exported.content.decode(), nl=False)
        return
    out.write_bytes(exported.content)
    if as_json:
        print_json({"out": str(out), "not_carried": exported.not_carried})
        return
    typer.echo(out)
    for sentence in exported.not_carried:
        typer.echo(f"not carried: {sentence}", err=True)


@schedules.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file that `export` wrote.")],
    model: Annotated[
        str | None, typer.Option(help="A model's id or name. [the file's]", autocompletion=complete_models)
    ] = None,
    private: Private = False,
    override: Annotated[
        bool, typer.Option("--override", help="Take it for a model with another content hash all the same.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Store a schedule made elsewhere."""
    content = _read(file)
    with connected(url) as client:
        if model is not None:
            content["model"] = find_model(client, model)
        if private:
            content["private"] = True
        if override:
            content["override"] = True
        schedule = client.schedules.import_(**content)
    if as_json:
        print_json(schedule)
    else:
        typer.echo(schedule.id)


@schedules.command()
def alias(
    name: Annotated[str, typer.Argument(help="A name such as production.")],
    schedule_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The schedule that gets the name.")] = None,
    remove_from: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Take the name away from this model's schedule.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Name a schedule, or move a name to it."""
    if (schedule_id is None) == (remove_from is None):
        raise CommandError("accepted: either a schedule's ID or --remove-from MODEL", USAGE)
    with connected(url) as client:
        if remove_from is not None:
            result: Any = {"deleted": name, "model": (model := find_model(client, remove_from))}
            client.aliases.delete(model, name)
        else:
            schedule = client.schedules.get(whole_id(client, str(schedule_id)))
            result = client.aliases.set(schedule.model, name, schedule.id)
    if as_json:
        print_json(result)
    else:
        typer.echo(name)


def show_schedule(schedule: "Schedule") -> None:
    """Print a schedule without its provenance."""
    print_facts(
        schedule.model_dump(
            include={
                "id",
                "owner",
                "private",
                "job",
                "model",
                "sampler",
                "clipping",
                "num_steps",
                "eta",
                "version",
                "status",
                "score",
            }
        )
        | {"guidance": _guidance(schedule), "timesteps": schedule.timesteps, "t_ratios": schedule.t_ratios}
        | ({} if schedule.solver_table is None else {"solver_table": schedule.solver_table})
        | ({} if schedule.evaluation is None else {"verdict": schedule.evaluation.verdict})
    )
    if schedule.evaluation is not None:
        typer.echo(f"\n{schedule.evaluation.summary or schedule.evaluation.reason or ''}")
        if schedule.evaluation.at_scales:
            scales = ((s.guidance_scale, s.verdict, s.score) for s in schedule.evaluation.at_scales)
            print_table(("guidance scale", "verdict", "score"), scales)
        metrics = schedule.evaluation.metrics.items()
        columns = ("metric", "diffusers' grid", "untuned", "tuned", "change", "from", "to")
        print_table(columns, ((name, m.stock, m.before, m.after, m.change, m.low, m.high) for name, m in metrics))


def verdict_of(schedule: "Schedule") -> str:
    """A schedule's verdict; `imported` if nothing was measured."""
    return (schedule.evaluation and schedule.evaluation.verdict) or schedule.status


def _guidance(schedule: "Schedule") -> str:
    """The type and scale, or interval of scales, of guidance; classifier-free guidance as cfg."""
    kind = {"classifier-free": "cfg", "uncond": "none"}.get(schedule.guidance_type, schedule.guidance_type)
    is_plain = schedule.guidance_type == "uncond" and schedule.guidance_scale == 1 and not schedule.guidance_scales
    scales = "..".join(f"{scale:g}" for scale in schedule.guidance_scales or [schedule.guidance_scale])
    return kind if is_plain else f"{'guided' if kind == 'none' else kind} x{scales}"


def _read(file: Path) -> Any:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise CommandError(f"{file} is not JSON ({error}); accepted: what `schedules export` wrote", USAGE) from None
    if not isinstance(content, dict):
        raise CommandError(f"{file} is no JSON object; accepted: what `schedules export` wrote", USAGE)
    return content
