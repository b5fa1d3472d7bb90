"""The `timetuner` command."""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from service.cli.compare import compare
from service.cli.doctor import doctor
from service.cli.jobs import jobs
from service.cli.keys import keys
from service.cli.models import models
from service.cli.output import explain, explain_missing, explain_settings
from service.cli.sample import sample
from service.cli.schedules import schedules
from service.cli.server import api, db, dispatcher, up, worker
from service.cli.tune import tune
from service.cli.usage import usage
from service.client import TimeTunerError
from service.shared.settings_error import SettingsError

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Tuned timesteps for frozen diffusion models."
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"timetuner {version('timetuner')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None: ...


for command in (up, api, worker, dispatcher, tune, sample, usage, compare, doctor):
    app.command()(command)
for name, group in {"models": models, "jobs": jobs, "schedules": schedules, "keys": keys, "db": db}.items():
    app.add_typer(group, name=name)


def main() -> None:
    """The console script. Errors are one line on stderr, and an exit code that docs/cli.md lists."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # Model configurations must not cause downloads.
    try:
        code = app(standalone_mode=False)
    except (TimeTunerError, typer.TyperException, OSError) as error:
        code = explain(error)
    except ModuleNotFoundError as error:
        code = explain_missing(error)
    except SettingsError as error:
        code = explain_settings(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code)
