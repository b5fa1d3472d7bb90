"""CPU time, wall time and memory of `timetuner up` to a first sample, of one or more checkouts in turns.

    python benchmarks/startup.py --turns 3 ../before .

Each checkout runs in this environment, so that only the code differs. Besides, the CPU time of `timetuner --help`.
CPU seconds are those of all processes, by what they do. Compare them as ratios, and wall time on a quiet machine only.
"""

import argparse
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

PARTS = {
    "valkey": "broker",
    "dispatcher": "dispatcher",
    "--queues sampling": "sampling worker",
    "--queues tuning": "tuning workers",
    " api --host": "API",
}


class Start(NamedTuple):
    """One start: seconds of CPU by part, seconds of wall, and megabytes of the API."""

    cpu: dict[str, float]
    wall: float
    api_megabytes: float


def main() -> None:
    """Print a line for each checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    starts: dict[Path, list[Start]] = {checkout: [] for checkout in arguments.checkouts}
    helps: dict[Path, list[float]] = {checkout: [] for checkout in arguments.checkouts}
    for _ in range(arguments.turns):
        for checkout in arguments.checkouts:
            starts[checkout].append(start(checkout))
            helps[checkout].append(help_seconds(checkout))
    for checkout in arguments.checkouts:
        every = starts[checkout]
        parts = {part: statistics.median(one.cpu.get(part, 0.0) for one in every) for part in ["up", *PARTS.values()]}
        total = statistics.median(sum(one.cpu.values()) for one in every)
        wall = statistics.median(one.wall for one in every)
        megabytes = statistics.median(one.api_megabytes for one in every)
        print(f"{checkout}: CPU {total:.2f} s, wall {wall:.1f} s, API {megabytes:.0f} MB", end=", ")
        print(
            f"--help {statistics.median(helps[checkout]):.2f} s;", ", ".join(f"{k} {v:.2f}" for k, v in parts.items())
        )


def start(checkout: Path) -> Start:
    """Start a service in a new home, register a built-in model and sample from it."""
    with tempfile.TemporaryDirectory(prefix="timetuner-") as home:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "service", "up", "--port", str(port), "--home", home]
        began = time.monotonic()
        with subprocess.Popen(command, cwd=home, env=_environment(checkout), stdout=subprocess.PIPE) as service:
            assert service.stdout is not None
            service.stdout.readline()
            model = json.loads(_post(port, "/v1/models", {"builtin": "digits8"}))["id"]
            _post(port, "/v1/samples", {"model": model, "num_steps": 5, "num_images": 4})
            wall = time.monotonic() - began
            cpu: dict[str, float] = {}
            api_megabytes = 0.0
            for pid in [service.pid, *_descendants(service.pid)]:
                line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                part = next((part for words, part in PARTS.items() if words in line), "up")
                cpu[part] = cpu.get(part, 0.0) + _cpu_seconds(pid)
                if part == "API":
                    api_megabytes = _megabytes(pid)
            service.send_signal(signal.SIGTERM)
    return Start(cpu, wall, api_megabytes)


def help_seconds(checkout: Path) -> float:
    """CPU seconds of `timetuner --help`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "service", "--help"]
    subprocess.run(
        command, env=_environment(checkout), stdout=subprocess.DEVNULL, check=True, cwd=tempfile.gettempdir()
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout.absolute())}


def _post(port: int, path: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content


def _descendants(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


if __name__ == "__main__":
    main()
