"""The service that a command talks to: by URL, or that of the home, which is started for the command if needed."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.output import UNREACHABLE, CommandError, stderr
from service.shared.processes import timetuner

if TYPE_CHECKING:
    from service.client import TimeTuner

Url = Annotated[
    str | None,
    typer.Option(
        envvar="TIMETUNER_URL", help="URL of the service. [that of TIMETUNER_HOME, started if it does not run]"
    ),
]

MAX_ATTEMPTS = 4
STOP_SECONDS = 60.0


@contextmanager
def connected(url: str | None, outlives: bool = False) -> Iterator["TimeTuner"]:
    """A client of the service.

    Args:
        outlives: the command starts work that goes on after it, so it cannot use a service of its own.

    Raises:
        CommandError: no such service runs, or none could be started.
    """
    from service.up.announcement import running_url

    url = url or running_url(own_home := home())
    if url is not None:
        with _client(url) as client:
            yield client
        return
    if outlives:
        accepted = "--url, or a service that runs: timetuner up"
        raise CommandError(f"--detach needs a service that outlives this command; accepted: {accepted}", UNREACHABLE)
    with _own_service(own_home) as url, _client(url) as client:
        yield client


def _client(url: str) -> "TimeTuner":
    from service.client import TimeTuner

    try:
        return TimeTuner(url, max_attempts=MAX_ATTEMPTS)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None


def home() -> Path:
    """The folder of the service of this machine."""
    from service.shared.settings import Settings

    return Settings().timetuner_home.absolute()


@contextmanager
def _own_service(home: Path) -> Iterator[str]:
    """A service for one command. Its processes end with this one, even if it is killed."""
    from service.up.supervisor import die_with_parent

    stderr.print(f"starting a service in {home} for this command (timetuner up keeps one running)", soft_wrap=True)
    home.mkdir(parents=True, exist_ok=True)
    log = home / "service.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = timetuner("up", "--port", str(port), "--tuning-workers", "1", "--unlisted")
    environment = os.environ | {"TIMETUNER_HOME": str(home)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,  # A terminal's Ctrl-C reaches only this process, which then stops the service.
            preexec_fn=die_with_parent,  # noqa: PLW1509 (we have no threads)
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()  # It is still there after STOP_SECONDS or a second Ctrl-C. Its children die with it.
            process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Wait until the service is ready. Its supervisor ends by itself if that takes too long."""
    import httpx

    while process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise CommandError(f"no service could be started; {log} says why", UNREACHABLE)
