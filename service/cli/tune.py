"""`timetuner tune`"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.completion import complete_objectives
from service.cli.connection import Url, connected
from service.cli.options import (
    CallArguments,
    Clipping,
    Eta,
    GuidanceEnd,
    GuidanceRescale,
    GuidanceScales,
    GuidanceStart,
    GuidanceType,
    Height,
    ImageFiles,
    ModelName,
    NegativePrompt,
    Private,
    SamplerName,
    Sizes,
    StepCounts,
    Timesteps,
    Width,
    assignment,
    call_of,
    find_model,
    given,
)
from service.cli.output import FAILED, USAGE, AsJson, CommandError, print_json, print_table, stderr
from service.cli.schedules import show_schedule, verdict_of
from service.client import ConflictError, JobFailedError
from service.client.choices import OBJECTIVES

if TYPE_CHECKING:
    from rich.table import Table

    from service.client import Schedule, TimeTuner, TuningGroup, TuningJob


def tune(
    model: ModelName,
    num_steps: StepCounts,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with a prompt per line, to tune a pipeline with. [64 of ours]")
    ] = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    sizes: Sizes = [],  # noqa: B006
    call: CallArguments = [],  # noqa: B006
    image: ImageFiles = [],  # noqa: B006
    sampler: SamplerName = None,
    clipping: Clipping = None,
    guidance_type: GuidanceType = None,
    guidance_scale: GuidanceScales = None,
    guidance_rescale: GuidanceRescale = None,
    guidance_start: GuidanceStart = None,
    guidance_end: GuidanceEnd = None,
    eta: Eta = None,
    timesteps: Timesteps = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help=f"The tuner's objective, {', '.join(OBJECTIVES)}; of several, each is tried. "
            "[the service's choice; with --tuner, end_to_end]",
            autocompletion=complete_objectives,
        ),
    ] = None,
    tuner: Annotated[
        list[Any], typer.Option(parser=assignment, metavar="NAME=VALUE", help="A field of the tuner; may be repeated.")
    ] = [],  # noqa: B006
    evaluation: Annotated[
        list[Any],
        typer.Option(parser=assignment, metavar="NAME=VALUE", help="A field of the evaluation; may be repeated."),
    ] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(help="[0]")] = None,
    private: Private = False,
    webhook_url: Annotated[str | None, typer.Option(help="URL that is told of the job's end.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show each step's ratio as it is tuned.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait: print the job's id.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Tune a schedule, or one for each number of steps and objective, and show how good they are. Ctrl-C cancels."""
    if watch and detach:
        raise CommandError("--watch and --detach are given; accepted: one of them", USAGE)
    request = given(
        prompts=None if prompts is None else _read_prompts(prompts),
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        sizes=sizes or None,
        call=call_of(call, image),
        sampler=sampler,
        clipping=clipping,
        guidance_type=guidance_type,
        guidance_rescale=guidance_rescale,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
        eta=eta,
        timesteps=timesteps,
        evaluation=dict(evaluation) or None,
        seed=seed,
        private=private or None,
        webhook_url=webhook_url,
        **(guidance_scale or {}),
    )
    objectives = [name.strip() for name in objective.split(",")] if objective else [None]
    tuners = [given(objective=name) | dict(tuner) for name in dict.fromkeys(objectives)]
    with connected(url, outlives=detach) as client:
        request["model"] = find_model(client, model)
        each = [
            request | {"num_steps": steps} | ({"tuner": one} if one else {}) for steps in num_steps for one in tuners
        ]
        if len(each) > 1:
            _tune_group(client, each, watch, detach, as_json)
            return
        job = client.tuning_jobs.create(**each[0])
        if detach:
            _print_job(job, as_json)
            return
        done = _wait(job, watch)
        schedule = client.schedules.get(str(done.schedule))
    if as_json:
        print_json({"job": done, "schedule": schedule})
    else:
        show_schedule(schedule)


def _tune_group(client: "TimeTuner", requests: list[Any], watch: bool, detach: bool, as_json: bool) -> None:
    """Say what several jobs cost, submit them as one group, and show what each made.

    Raises: CommandError, if one failed.
    """
    price = client.tuning_groups.create(requests, dry_run=True)
    time = "" if price.seconds is None else f", {price.seconds:.0f} s of one worker by the pace of earlier jobs"
    stderr.print(f"{len(requests)} jobs: at most {price.cost:,} samples through the network{time}", soft_wrap=True)
    group = client.tuning_groups.create(requests)
    if detach:
        if as_json:
            print_json(group)
        else:
            typer.echo(group.id)
        return
    try:
        for job in group.jobs:
            with suppress(JobFailedError):  # The others go on, and the end tells of it.
                _wait(client.tuning_jobs.get(job.id), watch)
    except KeyboardInterrupt:
        for job in group.jobs:
            with suppress(ConflictError):  # It is over.
                client.tuning_jobs.cancel(job.id)
        raise
    done = client.tuning_groups.get(str(group.id))
    schedules = {job.id: client.schedules.get(job.schedule) for job in done.jobs if job.schedule}
    if as_json:
        print_json({"group": done, "schedules": list(schedules.values())})
    else:
        _show_group(done, schedules)
    if failed := [job.id for job in done.jobs if job.state != "succeeded"]:
        raise CommandError(f"{len(failed)} of {len(done.jobs)} jobs did not succeed: {', '.join(failed)}", FAILED)


def _show_group(group: "TuningGroup", schedules: dict[str, "Schedule"]) -> None:
    """A line for each job: what it made, or its state."""
    rows: list[tuple[Any, ...]] = []
    for job in group.jobs:
        setting = (job.request["num_steps"], job.request["tuner"]["objective"])
        made = schedules.get(job.id)
        if made is None:
            rows.append((*setting, job.state, None, None))
        else:
            rows.append((*setting, verdict_of(made), made.score, made.id))
    print_table(("steps", "tuner", "verdict", "score", "schedule"), rows)


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises: CommandError."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        accepted = "a text file with one prompt per line"
        raise CommandError(f"--prompts is {str(path)!r} ({error}); accepted: {accepted}", USAGE) from None


def _print_job(job: "TuningJob", as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        typer.echo(job.id)


def _wait(job: "TuningJob", watch: bool) -> "TuningJob":
    """Wait until the job is over. Ctrl-C cancels it."""
    try:
        with _display(job, watch) as show:
            return job.wait(progress=show)
    except KeyboardInterrupt:
        stderr.print(f"cancelling {job.id}")
        job.cancel()
        raise


@contextmanager
def _display(job: "TuningJob", watch: bool) -> Iterator[Callable[["TuningJob"], None]]:
    """A function that shows the job on stderr. If that is no terminal, it prints a line per new state and phase."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from service.client.waiting import doing, remaining

    times = (TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *times)
    progress = Progress(*columns, console=stderr)
    bar = progress.add_task("", total=1.0, left="")
    told = ""

    def tell(job: "TuningJob") -> None:
        nonlocal told
        if doing(job) != told:
            told = doing(job)
            stderr.print(f"{job.id} {told}", soft_wrap=True)

    if not stderr.is_terminal:
        yield tell
        return
    with Live(progress, console=stderr) as live:

        def show(job: "TuningJob") -> None:
            left = remaining(job)
            description = f"{job.id} {doing(job)}"
            progress.update(bar, description=description, completed=job.progress, left=f"{left} left" if left else "")
            live.update(Group(_steps(job), progress) if watch else progress)

        yield show


def _steps(job: "TuningJob") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("step", "t", "t_ratio", "iterations", "loss"):
        table.add_column(column, justify="right")
    times = job.timesteps or []
    for step in job.steps:
        loss = "-" if step.loss is None else f"{step.loss:.4g}"
        time = f"{times[step.step_index]:.4f}" if times else "-"
        table.add_row(str(step.step_index), time, f"{step.t_ratio:.4f}", str(step.iterations), loss)
    return table
