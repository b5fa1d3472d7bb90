"""Commands of ours as forks of one process that has imported everything, which takes a start's 7 seconds only once.

`start` is like `subprocess.Popen`. What it starts is the same as a new interpreter's `python -m MODULE ...` but for the
imports; so each kind of process is also started for real by a test: `tests.service.test_supervisor` and others.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import entry_points
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from service.shared import sampler_facts
from service.up.supervisor import die_with_parent

# A fork's libraries keep what they read from the environment when they were loaded.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
MODULES = ("service", "worker", "worker.dispatcher")

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """A running fork, with the part of `Popen` that tests use."""

    def __init__(self, process: BaseProcess, command: list[str]) -> None:
        self._process = process
        self.args = command
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass(frozen=True)
class Order:
    """The command that a fork is to become."""

    program: str  # a module of MODULES, or a script's path
    arguments: list[str]
    environment: dict[str, str]
    folder: Path
    stdout: Path | None
    stderr: Path | None


def start(
    command: list[str],
    environment: dict[str, str],
    *,
    folder: Path | None = None,
    stdout: Path | None = None,
    stderr: Path | None = None,
) -> Forked:
    """Start `python -m MODULE *arguments` or `python SCRIPT.py`; what it prints goes to files, or where ours goes."""
    python, *options, program = command[:3] if command[1] == "-m" else command[:2]
    if python != sys.executable or (program not in MODULES if options else not program.endswith(".py")):
        raise ValueError(f"the command is {command}; accepted: python -m and one of {MODULES}, or python SCRIPT.py")
    _ensure_running()
    arguments = command[len(options) + 2 :]
    order = Order(program, arguments, environment, folder or Path.cwd(), stdout, stderr)
    process = _forks.Process(target=_become, args=(order,))
    process.start()
    return Forked(process, command)


def run(
    command: list[str], environment: dict[str, str], *, folder: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Start a command and wait for its end."""
    with TemporaryDirectory() as outputs:
        out, err = Path(outputs) / "out", Path(outputs) / "err"
        process = start(command, environment, folder=folder, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _ensure_running() -> None:
    """Have the process to fork from, whose libraries read `ENVIRONMENT` when they are loaded."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _become(order: Order) -> None:
    """Do in the fork what a new interpreter would do; it ends when the process that it was forked from ends."""
    die_with_parent()
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.folder)
    for file, number in ((order.stdout, 1), (order.stderr, 2)):
        if file is not None:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.path[:0] = filter(None, order.environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = [order.program, *order.arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch  # here, as the tests' own process may do without it

    torch.set_num_threads(int(order.environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if [order.program, *order.arguments[:1]] == ["service", "api"]:
        facts = _facts_of_installed_samplers()
        sampler_facts._installed_samplers = lambda: facts  # type: ignore[assignment]
    try:
        if order.program in MODULES:
            runpy.run_module(order.program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(order.program, run_name="__main__")
    finally:  # `multiprocessing` leaves out what an interpreter does at its end
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _facts_of_installed_samplers() -> dict[str, Any]:
    """The answer of `python -m timetuner_core.samplers`, from a fork, as an API would wait seconds for a new process.

    `tests.core.test_catalog` and `tests.service.test_error_texts` start that process for real.
    """
    from timetuner_core.catalog import SAMPLER_ENTRY_POINTS
    from timetuner_core.samplers.__main__ import _facts_of

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            facts = {entry.name: _facts_of(entry.name) for entry in entry_points(group=SAMPLER_ENTRY_POINTS)}
            os.write(writing, json.dumps(facts).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
