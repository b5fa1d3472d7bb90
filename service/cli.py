"""The `timetuner` command."""

import math
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn

from service.access.cli import keys
from service.access.local import is_loopback
from service.http_protocol import BoundedHttpProtocol
from service.logs import start_logging
from service.registry.database import Registry
from service.settings import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tuned timesteps for frozen diffusion models.")
db = typer.Typer(no_args_is_help=True, help="The registry's database.")
app.add_typer(db, name="db")
app.add_typer(keys, name="keys")

# Of `compare`, where they are not the names of what they say.
COMPARE_OPTIONS = {"models": "--model", "guidances": "--guidance", "entrants": "--tuners"}

Host = Annotated[str, typer.Option(help="Address to listen on; on any but loopback, requests need API keys.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]


@app.command()
def up(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    home: Annotated[Path | None, typer.Option(help="Folder of the database and all artifacts.")] = None,
    tuning_workers: Annotated[int, typer.Option(min=1, help="Tuning jobs at once, sharing the cores.")] = 2,
) -> None:
    """Run everything on this machine: broker, dispatcher, workers and API; Ctrl-C or SIGTERM stops it all.

    DATABASE_URL, ARTIFACTS_URL and BROKER_URL replace the embedded parts.
    """
    from service.supervisor import Supervisor

    _settle_authentication("up", host)
    if home is not None:
        os.environ["TIMETUNER_HOME"] = str(home.absolute())
    raise typer.Exit(Supervisor(host, port, tuning_workers).run())


@app.command()
def api(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Run the API alone."""
    _settle_authentication("api", host)
    settings = Settings()
    start_logging(settings.log_level)
    uvicorn.run(
        "service.app:create_app",
        factory=True,
        host=host,
        port=port,
        http=BoundedHttpProtocol,
        ws="none",
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )


def _settle_authentication(command: str, host: str) -> None:
    """Beyond this machine, have requests need API keys; where that was forbidden, do not start."""
    if is_loopback(host):
        return
    if Settings().auth == "off":
        accepted = "a loopback address, such as 127.0.0.1; or AUTH=on"
        typer.echo(f"timetuner {command}: --host is {host!r} while AUTH is 'off'; accepted: {accepted}", err=True)
        raise typer.Exit(2)
    os.environ["AUTH"] = "on"


@app.command()
def compare(
    model: Annotated[
        list[str] | None, typer.Option(help="Built-in name or diffusers-format folder; may be repeated. [all built-in]")
    ] = None,
    num_steps: Annotated[str, typer.Option(help="Numbers of steps, by commas.")] = "3,5,8,10,20",
    guidance: Annotated[str, typer.Option(help="uncond, cfg:SCALE, classifier:SCALE; by commas.")] = "uncond,cfg:2",
    samplers: Annotated[str, typer.Option(help="Samplers, by commas.")] = "ddim,dpmpp_2m",
    tuners: Annotated[str | None, typer.Option(help="Entrants, by commas; untuned is always one. [all]")] = None,
    num_samples: Annotated[int, typer.Option(help="Held-out noises that judge.")] = 256,
    seed: Annotated[int, typer.Option(help="Decides all figures.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for table, plots and report; an earlier one is replaced.")] = Path(
        "compare"
    ),
    jobs: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
) -> None:
    """Compare all tuners on models, samplers and numbers of steps, from the same noise; writes a report."""
    from timetuner_core.compare import PlanError

    # Unwind when told to stop, and so end the processes.
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
    except PlanError as error:
        option = COMPARE_OPTIONS.get(error.name, f"--{error.name.replace('_', '-')}")
        typer.echo(f"timetuner compare: {option} is {error.value!r}; accepted: {error.accepted}", err=True)
        raise typer.Exit(2) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def _compare(options: dict[str, Any], out: Path, jobs: int) -> None:
    """Raises PlanError."""
    from rich.console import Console
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
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{len(plan.settings)} settings, {len(plan.entrants)} entrants", total=1.0)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        comparison = run(plan, jobs or cores, lambda share: progress.advance(task, share))
    write(comparison, out, shlex.join(["timetuner", *sys.argv[1:]]))
    typer.echo(out / "report.html")


def _listed(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word for part in text.split(",") if (word := part.strip()))


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    from timetuner_core.compare import PlanError

    try:
        return tuple(map(int, _listed(text)))
    except ValueError:
        raise PlanError(name, text, "whole numbers, by commas") from None


@db.command()
def upgrade() -> None:
    """Bring the database to the newest schema, creating it if need be."""
    registry = Registry(Settings().database_url)
    registry.upgrade()
    registry.close()


def main() -> None:
    """The console script."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # whatever a model's configuration may say, nothing is fetched
    app()
