"""Output of commands: results on stdout, all else on stderr, and the exit codes."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

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

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on stdout.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The largest number of rows. [all]")]

FAILED, USAGE, UNREACHABLE, REFUSED, NOT_FOUND = 1, 2, 3, 4, 5
ID = re.compile(r"[a-z]{3}_[0-9A-Z]{26}")
SHORT_LENGTH = 8  # A short id has so many letters behind its prefix, all of them random.
ID_COLUMNS = ("id", "schedule", "created", "made")
DIGITS = 4
WIDE = 100  # Narrower terminals have one space between columns, not two.
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
    """Print a line for each row. In a terminal, ids are short and times relative, so that rows fit its width."""
    from rich.table import Table

    console = _console()
    table = Table(box=None, pad_edge=False, collapse_padding=console.width < WIDE)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ID_COLUMNS)
    for row in rows:
        table.add_row(*(_text(value, is_short=console.is_terminal) for value in row))
    console.print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print a line for each fact."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _text(value))
    _console().print(table)


def short_id(id: str) -> str:
    """The end of an id behind its prefix, which commands take in its place."""
    prefix, _, unique = id.rpartition("_")
    return f"{prefix}_{unique[-SHORT_LENGTH:]}"


def only_one(id: str, found: Sequence[str]) -> str | None:
    """The one id that a short one stands for; None if there is none. Raises: CommandError, if there are several."""
    if len(found) > 1:
        raise CommandError(f"{id!r} may be {' or '.join(found)}; accepted: one of these", USAGE)
    return found[0] if found else None


def rounded(value: Any) -> Any:
    """JSON whose numbers have as many digits as mean something to people."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def ago(time: datetime) -> str:
    """How long ago a time was, in a few words; before yesterday, its day."""
    seconds = (datetime.now(UTC) - time).total_seconds()
    for unit, most, length in (("s", 60, 1), ("min", 3600, 60), ("h", 86_400, 3600)):
        if seconds < most:
            return f"{max(seconds, 0) // length:.0f} {unit} ago"
    return f"{time:%Y-%m-%d}"


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1000  # Each row is one line.
    return console


def _text(value: Any, is_short: bool = False) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return ago(value) if is_short else f"{value:%Y-%m-%dT%H:%M:%SZ}"
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, dict):
        return json.dumps(rounded(value), default=str)
    text = str(value)
    return short_id(text) if is_short and ID.fullmatch(text) else text
