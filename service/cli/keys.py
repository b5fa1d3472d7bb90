"""`timetuner keys`. It works on the database, because nobody can use the API before there is a key."""

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.output import NOT_FOUND, AsJson, CommandError, only_one, print_json, print_table, short_id, stderr

if TYPE_CHECKING:
    from service.registry.tables import ApiKey

keys = typer.Typer(no_args_is_help=True, help="API keys, in the registry's database.")

SCOPES = "sample, tune, models:write or admin"
UNITS = {"m": "minutes", "h": "hours", "d": "days"}
FIRST_KEY = "This is the first key: from now on requests need one, unless AUTH is off."
WHERE_KEYS_ARE_READ = "Commands and the Python client take theirs from the variable TIMETUNER_API_KEY."
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


def _scope(text: str) -> str:
    from service.registry.keys import Scope  # This import is slow.

    if text not in list(Scope):
        raise typer.BadParameter(f"{text!r}; accepted: {', '.join(Scope)}")
    return text


@keys.command()
def create(
    name: Annotated[str, typer.Option(parser=_name, metavar="NAME", help="Whose it is, for people to read.")],
    scope: Annotated[
        list[str],
        typer.Option(parser=_scope, metavar="SCOPE", help=f"{SCOPES}; may be repeated. [reading only]"),
    ] = [],  # noqa: B006
    expires_in: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="DURATION", help="Such as 12h or 90d. [never]")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, max=100_000, help="[no limit]")] = None,
    pixel_steps_per_day: Annotated[
        int | None, typer.Option(min=1, max=2**62, help="Values x steps x images x network calls. [no limit]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It cannot be shown again."""
    from service.cli.registry import open_registry
    from service.registry.keys import Scope, any_key, create_key

    scopes = [Scope(each) for each in scope]
    with open_registry() as registry, registry.write() as session:
        is_first = not any_key(session)
        key, text = create_key(session, name, scopes, expires_in, requests_per_minute, pixel_steps_per_day)
    if as_json:
        print_json(_fields(key) | {"key": text})
        return
    if is_first:
        stderr.print(f"{FIRST_KEY} {WHERE_KEYS_ARE_READ}", soft_wrap=True)
    typer.echo(f"{key.id}, shown this once:", err=True)
    typer.echo(text)


@keys.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """List all keys, newest first."""
    from service.cli.registry import open_registry
    from service.registry.keys import list_keys

    with open_registry() as registry, registry.read() as session:
        rows = list_keys(session)
    if as_json:
        print_json([_fields(key) for key in rows])
        return
    columns = ("id", "prefix", "name", "scopes", "limits", "state", "last used")
    print_table(
        columns,
        (
            (key.id, key.prefix, key.name, ", ".join(key.scopes) or "-", _limits(key), _state(key), _used(key))
            for key in rows
        ),
    )


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="A key's id, whole or short.")], as_json: AsJson = False
) -> None:
    """Revoke a key. This takes effect within two seconds. Its jobs that are not over are cancelled."""
    from service.cli.registry import open_registry
    from service.registry.keys import list_keys, revoke_key

    with open_registry() as registry, registry.write() as session:
        named = [key.id for key in list_keys(session) if key_id in (key.id, short_id(key.id))]
        whole = only_one(key_id, named)
        key = None if whole is None else revoke_key(session, whole)
    if key is None:
        raise CommandError(f"no key {key_id!r}; accepted: an id that `timetuner keys list` has", NOT_FOUND)
    if as_json:
        print_json(_fields(key))


def _fields(key: "ApiKey") -> dict[str, Any]:
    """The fields of a key that are no secret."""
    names = ("id", "prefix", "name", "scopes", "requests_per_minute", "pixel_steps_per_day")
    times = ("created_at", "expires_at", "revoked_at", "last_used_at")
    return {name: getattr(key, name) for name in names + times}


def _limits(key: "ApiKey") -> str:
    limits = {"requests a minute": key.requests_per_minute, "pixel steps a day": key.pixel_steps_per_day}
    return ", ".join(f"{limit} {what}" for what, limit in limits.items() if limit is not None) or "-"


def _state(key: "ApiKey") -> str:
    if key.revoked_at is not None:
        return f"revoked {_time(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    return f"{'expired' if key.expires_at <= datetime.now(UTC) else 'until'} {_time(key.expires_at)}"


def _used(key: "ApiKey") -> str:
    return _time(key.last_used_at) if key.last_used_at else "never"


def _time(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%MZ}"
