"""`timetuner up`: one command, one process tree, nothing left behind, nothing forgotten."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.stack import START_SECONDS, Json, free_port, wait_until

QUICK: Json = {"tuner": {"total_iters": 2, "population_size": 16}, "evaluation": {"num_samples": 16}}


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, as a Unix socket's is bounded."""
    with tempfile.TemporaryDirectory(prefix="timetuner-up-") as folder:
        yield Path(folder)


@contextmanager
def up(database_url: str, home: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`timetuner up`, once it says that it is ready; whoever uses it must end it."""
    port = str(free_port())
    command = [sys.executable, "-m", "service", "up", "--port", port, "--home", str(home), "--tuning-workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("BROKER_URL", "ARTIFACTS_URL")}
    environment |= {"DATABASE_URL": database_url, "OMP_NUM_THREADS": "1", "TMPDIR": str(home)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert f"ready at http://127.0.0.1:{port}" in process.stdout.readline()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield process, client
        assert process.poll() is not None
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> dict[int, str]:
    """All processes below one, and their command lines."""
    found: dict[int, str] = {}
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            found |= descendants(child)
    return found


def listed_models(home: Path) -> list[str]:
    """The ids that a command prints which is told the home alone, without starting a service of its own."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TIMETUNER_URL", "TIMETUNER_API_KEY")
    }
    command = [sys.executable, "-m", "service", "models", "list", "--json"]
    done = subprocess.run(
        command, env=environment | {"TIMETUNER_HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [model["id"] for model in json.loads(done.stdout)]


def test_everything_stops_together_and_the_next_start_knows_all_that_was(empty_database_url: str, home: Path) -> None:
    with up(empty_database_url, home) as (process, client):
        model = client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
        job = client.post("/v1/tuning-jobs", json={"model": model, "num_steps": 3, **QUICK}).json()
        url = f"/v1/tuning-jobs/{job['id']}"
        job = wait_until(lambda: (now := client.get(url).json())["finished_at"] and now, "end of the job")
        schedule = client.get(f"/v1/schedules/{job['schedule']}").json()
        started = descendants(process.pid)
        parts = ("valkey-server", "worker.dispatcher", "--queues sampling", "--queues tuning", "service api")
        assert all(any(part in command for command in started.values()) for part in parts), started
        assert listed_models(home) == [model]
        process.terminate()
        assert process.wait(START_SECONDS) == 0
        assert [command for pid, command in started.items() if is_alive(pid)] == []
    assert not list(home.glob("timetuner-*"))  # the broker's folder
    assert not (home / "url").exists()

    with up(empty_database_url, home) as (process, client):
        assert client.get(f"/v1/schedules/{schedule['id']}").json() == schedule
        body = {"model": model, "num_steps": 3, "schedule": schedule["id"]}
        answer = client.post("/v1/samples", json=body, headers={"Accept": "application/x-npy"})
        assert answer.headers["timetuner-schedule"] == schedule["id"]
        started = descendants(process.pid)
        dispatcher = next(pid for pid, command in started.items() if "worker.dispatcher" in command)
        os.kill(dispatcher, signal.SIGKILL)  # a part that dies takes the rest with it, for an init to start all anew
        assert process.wait(START_SECONDS) == 1
        assert [command for pid, command in started.items() if is_alive(pid)] == []
