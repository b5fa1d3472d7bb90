"""`timetuner compare`, which needs no service."""

import csv
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.output import USAGE, AsJson, CommandError, print_json, stderr
from service.client.choices import SAMPLERS

# These fields of a plan have options of another name.
OPTIONS = {"models": "--model", "guidances": "--guidance", "entrants": "--tuners"}


def compare(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Built-in name or diffusers-format folder; may be repeated. [all built-in but fashion32]"),
    ] = None,
    num_steps: Annotated[str, typer.Option(help="Numbers of steps, by commas.")] = "3,5,8,10,20",
    guidance: Annotated[str, typer.Option(help="uncond, cfg:SCALE, classifier:SCALE; by commas.")] = "uncond",
    samplers: Annotated[str, typer.Option(help=f"By commas, of {', '.join(SAMPLERS)}.")] = "ddim,dpmpp_2m",
    tuners: Annotated[str | None, typer.Option(help="Entrants, by commas; untuned is always one. [all]")] = None,
    num_samples: Annotated[int, typer.Option(help="Held-out noises that judge.")] = 256,
    seed: Annotated[int, typer.Option(help="Decides all figures.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for table, plots and report; an earlier one is replaced.")] = Path(
        "compare"
    ),
    jobs: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare all tuners on models, samplers and numbers of steps, from the same noise; writes a report."""
    from timetuner_core.compare import PlanError

    # SIGTERM unwinds the stack, which ends the worker processes.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options = {
            "models": model,
            "num_steps": _whole_numbers("num_steps", num_steps),
            "guidances": _listed(guidance),
            "samplers": _listed(samplers),
            "entrants": None if tuners is None else _listed(tuners),
            "num_samples": num_samples,
            "seed": seed,
        }
        _compare({name: value for name, value in options.items() if value is not None}, out, jobs)
        if as_json:
            with (out / "results.csv").open(newline="") as file:
                print_json({"report": str(out / "report.html"), "results": list(csv.DictReader(file))})
        else:
            typer.echo(out / "report.html")
    except PlanError as error:
        option = OPTIONS.get(error.name, f"--{error.name.replace('_', '-')}")
        raise CommandError(f"compare: {option} is {error.value!r}; accepted: {error.accepted}", USAGE) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def _compare(options: dict[str, Any], out: Path, jobs: int) -> None:
    """Raises PlanError."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from timetuner_core.compare import Plan, PlanError, run
    from timetuner_core.compare.report import check_folder, write

    if jobs < 0:
        raise PlanError("jobs", jobs, "0, for one per core, or more")
    check_folder(out)
    plan = Plan(**options)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=stderr) as progress:
        task = progress.add_task(f"{len(plan.settings)} settings, {len(plan.entrants)} entrants", total=1.0)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        comparison = run(plan, jobs or cores, lambda share: progress.advance(task, share))
    write(comparison, out, shlex.join(["timetuner", *sys.argv[1:]]))


def _listed(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word for part in text.split(",") if (word := part.strip()))


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    from timetuner_core.compare import PlanError

    try:
        return tuple(map(int, _listed(text)))
    except ValueError:
        raise PlanError(name, text, "whole numbers, by commas") from None
