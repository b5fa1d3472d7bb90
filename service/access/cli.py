"""`timetuner keys`: on the database itself, as nobody can use the API before there is a key."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from service.registry.database import Registry
from service.registry.keys import Scope, create_key, list_keys, revoke_key
from service.registry.tables import ApiKey
from service.registry.types import utc_now
from service.settings import Settings

keys = typer.Typer(no_args_is_help=True, help="API keys, in the registry's database.")

UNITS = {"m": "minutes", "h": "hours", "d": "days"}
LONGEST = timedelta(days=36_500)


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"([1-9]\d{0,8})([mhd])", text, re.ASCII)
    duration = timedelta(**{UNITS[match[2]]: int(match[1])}) if match else None
    if duration is None or duration > LONGEST:
        raise typer.BadParameter(f"{text!r}; accepted: a number of minutes, hours or days, such as 30m, 12h or 90d")
    return duration


def _name(text: str) -> str:
    if not 1 <= len(text) <= 200 or not text.isprintable():
        raise typer.BadParameter(f"{text!r}; accepted: 1 to 200 printable characters")
    return text


@keys.command()
def create(
    name: Annotated[str, typer.Option(parser=_name, metavar="NAME", help="Whose it is, for people to read.")],
    scope: Annotated[list[Scope], typer.Option(help="What it may do; may be repeated. [reading only]")] = [],  # noqa: B006
    expires_in: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="DURATION", help="Such as 12h or 90d. [never]")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, max=100_000, help="[no limit]")] = None,
    pixel_steps_per_day: Annotated[
        int | None, typer.Option(min=1, max=2**62, help="Values x steps x images x network calls. [no limit]")
    ] = None,
) -> None:
    """Make a key, and print it: it cannot be had again."""
    with _registry("create") as registry, registry.write() as session:
        key, text = create_key(session, name, scope, expires_in, requests_per_minute, pixel_steps_per_day)
    typer.echo(f"{key.id}, shown this once:", err=True)
    typer.echo(text)


@keys.command(name="list")
def list_() -> None:
    """All keys, newest first."""
    with _registry("list") as registry, registry.read() as session:
        rows = list_keys(session)
    table = Table(box=None, pad_edge=False)
    for column in ("id", "prefix", "name", "scopes", "limits", "state", "last used"):
        table.add_column(column, overflow="fold")
    for key in rows:
        used = _time(key.last_used_at) if key.last_used_at else "never"
        table.add_row(key.id, key.prefix, key.name, ", ".join(key.scopes) or "-", _limits(key), _state(key), used)
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # one line each
    console.print(table)


@keys.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="Such as key_01J...")]) -> None:
    """Make a key worthless, within a second or two; its jobs stay."""
    with _registry("revoke") as registry, registry.write() as session:
        found = revoke_key(session, key_id) is not None
    if not found:
        typer.echo(
            f"timetuner keys revoke: no key {key_id!r}; accepted: an id that `timetuner keys list` has", err=True
        )
        raise typer.Exit(2)


@contextmanager
def _registry(command: str) -> Iterator[Registry]:
    """The database; if it cannot be used, one line says so."""
    registry = Registry(Settings().database_url)
    try:
        yield registry
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).partition("\n")[0]
        database = registry.url.render_as_string()
        message = f"{database} cannot be used: {reason}; accepted: a database after `timetuner db upgrade`"
        typer.echo(f"timetuner keys {command}: {message}", err=True)
        raise typer.Exit(2) from None
    finally:
        registry.close()


def _limits(key: ApiKey) -> str:
    limits = {"requests a minute": key.requests_per_minute, "pixel steps a day": key.pixel_steps_per_day}
    return ", ".join(f"{limit} {what}" for what, limit in limits.items() if limit is not None) or "-"


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return f"revoked {_time(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    return f"{'expired' if key.expires_at <= utc_now() else 'until'} {_time(key.expires_at)}"


def _time(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%MZ}"
