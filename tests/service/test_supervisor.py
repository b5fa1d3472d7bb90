"""`timetuner up`: one command, one process tree, nothing left behind, nothing forgotten; what ends starts again."""

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

from service.shared.settings import Settings
from service.up.supervisor import API, Child, Supervisor
from tests.stack import QUICK, START_SECONDS, free_port, wait_until
from worker.devices import all_devices

TIMETUNER = str(Path(sys.executable).parent / "timetuner")
FOREIGN = "foreign"  # This file shows that a module of the user's folder was imported.
PARTS = ("valkey-server", "timetuner dispatcher", "--queues sampling", "--queues tuning", "timetuner api")


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, as a Unix socket's is bounded."""
    with tempfile.TemporaryDirectory(prefix="timetuner-up-") as folder:
        yield Path(folder)


def with_folders_of_our_names(home: Path) -> Path:
    """A user's folder whose modules are called as ours are; the first to be imported writes a file into `home`."""
    folder = home / "folder"
    folder.mkdir(exist_ok=True)
    code = f"open({str(home / FOREIGN)!r}, 'w').close()\n"
    for name in ("worker.py", "celeryconfig.py", "migrations.py"):
        (folder / name).write_text(code)
    (folder / "service").mkdir(exist_ok=True)
    (folder / "service" / "__init__.py").write_text(code)
    return folder


@contextmanager
def up(database_url: str, home: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`timetuner up`, once it says that it is ready; whoever uses it must end it."""
    port = str(free_port())
    folder = with_folders_of_our_names(home)
    command = [TIMETUNER, "up", "--port", port, "--home", str(home), "--tuning-workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("BROKER_URL", "ARTIFACTS_URL")}
    environment |= {"DATABASE_URL": database_url, "OMP_NUM_THREADS": "1", "TMPDIR": str(home)}
    environment["PYTHONPATH"] = str(folder)
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert f"ready at http://127.0.0.1:{port}" in process.stdout.readline()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield process, client
        assert process.poll() is not None
        assert not (home / FOREIGN).exists()
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
        assert all(any(part in command for command in started.values()) for part in PARTS), started
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
        killed = descendants(process.pid)
        for pid in killed:  # All children are lost together, and with the broker all that it held.
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in killed), "end of what was killed")
        # No connection is refused: the supervisor holds the socket, and they wait there for the next API.
        url = str(client.base_url.join("/v1/samples"))
        again = httpx.post(url, json=body | {"seed": 1}, headers={"Accept": "application/x-npy"}, timeout=60)
        assert again.status_code == 200, again.text
        assert len(descendants(process.pid)) >= len(PARTS) - 1
        started = descendants(process.pid)
        process.terminate()
        assert process.wait(START_SECONDS) == 0
        assert [command for pid, command in (killed | started).items() if is_alive(pid)] == []


def child(code: str) -> Child:
    return Child("part", [sys.executable, "-c", code], dict(os.environ))


def test_a_process_that_ends_is_started_again_after_pauses_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.up.supervisor.time.monotonic", lambda: now)
    part = child("raise SystemExit(7)")
    part.start()
    pauses = []
    for _ in range(8):
        assert part.process is not None
        part.process.wait()
        assert part.tend() == 7
        pauses.append(part.pause)
        now += part.pause / 2
        assert part.tend() is None and part.next_start is not None  # The pause is not over.
        now += part.pause
        assert part.tend() is None and part.next_start is None
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    now += 61  # It ran for a minute, so the fault that there was is over.
    assert part.process is not None
    part.process.wait()
    part.tend()
    assert part.pause == 0.5


@pytest.mark.parametrize(("name", "given_up"), [(API, True), ("dispatcher", False)])
def test_only_the_api_is_given_up(
    name: str, given_up: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("service.up.supervisor.time.monotonic", lambda: now)
    part = child("raise SystemExit(1)")
    part.name = name
    part.start()
    supervisor = Supervisor("127.0.0.1", 1, 1, children=[part])
    codes: list[object] = []
    for _ in range(10):
        assert part.process is not None
        part.process.wait()
        try:
            supervisor._tend()
        except SystemExit as stop:
            codes.append(stop.code)
            break
        now += 100
        supervisor._tend()
        now += 1
    assert codes == ([1] if given_up else [])
    assert f"timetuner: the {name} ended with code 1" in capsys.readouterr().err


def workers_of(monkeypatch: pytest.MonkeyPatch, *devices: str, tuning_workers: int = 2) -> list[tuple[str, str, str]]:
    """Name, device and metrics port of each worker that a supervisor starts; no process is started."""
    monkeypatch.setattr(Child, "start", lambda self: None)
    supervisor = Supervisor("127.0.0.1", 1, tuning_workers, settings=Settings(metrics_port=9000), devices=devices)
    supervisor._find_devices(dict(os.environ))
    supervisor._start_all({}, [])
    supervisor._start_tuning_workers({})
    workers = [child for child in supervisor.children if "worker" in child.command]
    return [(child.name, child.environment["DEVICE"], child.environment["METRICS_PORT"]) for child in workers]


def test_each_device_has_a_sampling_worker_and_a_tuning_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "service.up.supervisor.subprocess.run",
        lambda *_, **__: subprocess.CompletedProcess([], 0, '["cuda:0", "cuda:1", "cuda:2"]'),
    )
    assert workers_of(monkeypatch, "all") == [
        *[(f"sampling worker {k + 1}", f"cuda:{k}", str(9000 + k)) for k in range(3)],
        *[(f"tuning worker {k + 1}", f"cuda:{k}", str(9003 + k)) for k in range(3)],
    ]
    assert workers_of(monkeypatch, "cuda:1", tuning_workers=3) == [
        ("sampling worker", "cuda:1", "9000"),
        *[(f"tuning worker {k + 1}", "cuda:1", str(9001 + k)) for k in range(3)],
    ]
    assert [device for _, device, _ in workers_of(monkeypatch)] == ["auto"] * 3  # DEVICE says so.


def test_all_devices_are_every_gpu_or_else_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, expected in ((2, ["cuda:0", "cuda:1"]), (0, ["cpu"])):
        monkeypatch.setattr("torch.cuda.device_count", lambda number=number: number)
        monkeypatch.setattr("torch.xpu.device_count", lambda: 0)
        assert all_devices() == expected


def refused(home: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """The exit code of a command that cannot be run, and what it says."""
    given = {name: value for name, value in os.environ.items() if name not in ("BROKER_URL", "DATABASE_URL")}
    command = [TIMETUNER, *arguments]
    environment = given | {"TIMETUNER_HOME": str(home)} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=START_SECONDS)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def test_devices_that_cannot_be_are_refused_before_anything_starts(home: Path) -> None:
    code, said = refused(home, "up", "--devices", "cuda:0,tpu")
    assert code == 2
    accepted = "all, or one or more of auto, cpu, cuda, cuda:0, cuda:1, ..., by commas"
    assert said == [f"timetuner: up: --devices has 'tpu'; accepted: {accepted}"]


def test_a_device_that_is_absent_ends_the_start_with_one_line(home: Path) -> None:
    code, said = refused(home, "up", "--port", str(free_port()), DEVICE="cuda:99")
    assert code == 2
    said = [line for line in said if "not ready after" not in line]  # A busy machine takes a while.
    assert [line.partition(" (")[0] for line in said] == [
        "timetuner: starting the broker",
        f"timetuner: bringing sqlite:///{home}/registry.sqlite to the newest schema",
        "timetuner: starting dispatcher, sampling worker and API",
        "timetuner: DEVICE is 'cuda:99', which cannot be used",
        "timetuner: the sampling worker cannot be run",
    ]
    assert said[-2].endswith("accepted: auto, cpu, or a device that this machine has")
