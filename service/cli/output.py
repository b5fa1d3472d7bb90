"""Output of commands: results on stdout, all else on stderr, and the exit codes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from service.client import (
    ForbiddenError,
    InvalidError,
    NotFoundError,
    TimeTunerError,
    UnauthenticatedError,
    UnreachableError,
)
from service.shared.settings_error import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on stdout.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The largest number of rows. [all]")]

FAILED, USAGE, UNREACHABLE, REFUSED, NOT_FOUND = 1, 2, 3, 4, 5
OUR_PACKAGES = ("service", "worker", "migrations", "timetuner_core")
CODES: dict[type[Exception], int] = {
    InvalidError: USAGE,
    UnreachableError: UNREACHABLE,
    UnauthenticatedError: REFUSED,
    ForbiddenError: REFUSED,
    NotFoundError: NOT_FOUND,
}

stderr = Console(stderr=True, highlight=False)


class CommandError(TimeTunerError):
    """An error that a command itself finds, and its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def explain(error: Exception) -> int:
    """Print one line; returns the exit code."""
    if isinstance(error, typer.TyperException):
        if message := error.format_message():  # There is no message if the help was printed.
            typer.echo(f"timetuner: {' '.join(message.split())}", err=True)
        return error.exit_code
    typer.echo(f"timetuner: {' '.join(str(error).split())}", err=True)
    if isinstance(error, CommandError):
        return error.code
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), FAILED)


def explain_missing(error: ModuleNotFoundError) -> int:
    """Say which extra a command needs; returns the exit code. Raises: the error, if a module of ours is missing."""
    package = (error.name or "").partition(".")[0]
    if package in OUR_PACKAGES:
        raise error
    accepted = "pip install 'timetuner[server,worker]' for a service here, 'timetuner[diffusers]' for the library, or"
    message = f"this needs {package!r}, which is not installed; accepted: {accepted} --url of a service elsewhere"
    typer.echo(f"timetuner: {message}", err=True)
    return UNREACHABLE


def explain_settings(error: SettingsError) -> int:
    """Print a line for each setting that cannot be used; returns the exit code."""
    for line in error.lines:
        typer.echo(f"timetuner: {line}", err=True)
    return USAGE


def print_json(value: Any) -> None:
    from pydantic_core import to_jsonable_python

    typer.echo(json.dumps(to_jsonable_python(value), indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a line for each row, no wider than the terminal if there is one."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    _print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print a line for each fact."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _text(value))
    _print(table)


def _print(table: "Table") -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1000  # Each row is one line.
    console.print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%SZ}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return str(value)
