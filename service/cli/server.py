"""`timetuner up`, `api`, `worker`, `dispatcher` and `db`: running the service."""

import json
import math
import os
import re
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from service.cli.output import FAILED, UNREACHABLE, USAGE, AsJson, CommandError, print_json
from service.shared.garbage import no_collections

db = typer.Typer(no_args_is_help=True, help="The registry's database.")

Host = Annotated[str, typer.Option(help="Address to listen on. On any but loopback, requests need API keys.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]


def up(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    home: Annotated[Path | None, typer.Option(help="Folder of the database and all artifacts.")] = None,
    tuning_workers: Annotated[int, typer.Option(min=1, help="Tuning jobs at once, sharing the cores.")] = 2,
    devices: Annotated[
        str | None,
        typer.Option(help="Devices by commas, such as cuda:0,cuda:1, or all. Each has a sampling and a tuning worker."),
    ] = None,
    listed: Annotated[bool, typer.Option("--listed/--unlisted", hidden=True)] = True,
    as_json: AsJson = False,
) -> None:
    """Run everything on this machine: broker, dispatcher, workers and API; Ctrl-C or SIGTERM stops it all.

    DATABASE_URL, ARTIFACTS_URL and BROKER_URL replace the embedded parts.
    """
    with no_collections():
        from service.cli.registry import database_errors
        from service.shared.settings import Settings
        from service.up.listening import AddressError
        from service.up.supervisor import Supervisor

    _settle_authentication("up", host)
    if home is not None:
        os.environ["TIMETUNER_HOME"] = str(home.absolute())
    settings = Settings()
    supervisor = Supervisor(host, port, tuning_workers, listed, settings, _devices(devices))
    ready = (
        json.dumps({"url": supervisor.url}) if as_json else f"TimeTuner is ready at {supervisor.url} (Ctrl-C stops it)"
    )
    try:
        with database_errors(settings.database_url):
            code = supervisor.run(ready)
    except AddressError as error:
        raise CommandError(f"up: {error}", UNREACHABLE) from None
    raise typer.Exit(code)


def api(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    fd: Annotated[list[int], typer.Option(hidden=True, help="A socket that the parent process listens on.")] = [],  # noqa: B006
) -> None:
    """Run the API alone."""
    with no_collections():
        import uvicorn

        from service.http.protocol import BoundedHttpProtocol
        from service.shared.logs import start_logging
        from service.shared.settings import Settings
        from service.up.listening import AddressError, listen

    _settle_authentication("api", host)
    settings = Settings()
    start_logging(settings.log_level)
    try:
        sockets = [socket.socket(fileno=number) for number in fd] or listen(host, port)
    except AddressError as error:
        raise CommandError(f"api: {error}", UNREACHABLE) from None
    config = uvicorn.Config(
        "service.app:create_app",
        factory=True,
        proxy_headers=False,  # The application has uvicorn's middleware for them itself, and adds headers to it.
        http=BoundedHttpProtocol,
        ws="none",
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )
    with no_collections():
        config.load()
    server = uvicorn.Server(config)
    # The server stops in order, and raises the signal again: a SIGTERM would then end the process with status 143.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        server.run(sockets)
    if not server.started:
        raise typer.Exit(FAILED)


def worker(
    queues: Annotated[str, typer.Option(help="Queues to serve, by commas.")] = "sampling,tuning",
) -> None:
    """Run one worker, for one device, until SIGTERM."""
    with no_collections():
        from worker.__main__ import serve

    serve(queues)


def dispatcher() -> None:
    """Run the dispatcher until SIGTERM: it queues jobs again, deletes old samples, and sends webhooks."""
    with no_collections():
        from worker.dispatcher import main

    main()


def _devices(value: str | None) -> tuple[str, ...]:
    """The devices of `--devices`. Raises: CommandError, for one that `DEVICE` could not be."""
    from service.shared.settings import ACCEPTED, DEVICE

    names = () if value is None else tuple(name.strip() for name in value.split(","))
    for name in () if names == ("all",) else names:
        if not re.fullmatch(DEVICE, name):
            accepted = f"all, or one or more of {ACCEPTED['device']}, by commas"
            raise CommandError(f"up: --devices has {name!r}; accepted: {accepted}", USAGE)
    return names


def _settle_authentication(command: str, host: str) -> None:
    """Require API keys if the service can be reached from other machines. Refuse to start if AUTH forbids that."""
    from service.access.local import is_loopback
    from service.shared.settings import Settings

    if is_loopback(host):
        return
    if Settings().auth == "off":
        accepted = "a loopback address, such as 127.0.0.1; or AUTH=on"
        raise CommandError(f"{command}: --host is {host!r} while AUTH is 'off'; accepted: {accepted}", USAGE)
    os.environ["AUTH"] = "on"


@db.command()
def upgrade(as_json: AsJson = False) -> None:
    """Bring the database to the newest schema, creating it if need be."""
    from service.cli.registry import open_registry

    with open_registry() as registry:
        registry.upgrade()
        revision, _ = registry.revisions()
    if as_json:
        print_json({"schema": revision})
