"""The containers' deployment, as far as it can be tested without containers: what it promises, and its commands."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
import yaml
from psycopg.pq import Conninfo
from sqlalchemy import make_url
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from service.shared.settings import Settings
from service.up.supervisor import STOP_SECONDS, valkey_command
from tests import forked
from tests.conftest import MakeDatabaseUrl
from tests.stack import Process, free_port, wait_until

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONCE = "migrate"
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("timetuner-")]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RUN_HERE = ["api", "dispatcher", "tuning-worker-cpu", "sampling-worker-cpu"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    uid = service["user"].partition(":")[0]
    assert int(uid) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert not service.get("privileged") and not service.get("cap_add") and "docker.sock" not in str(service)
    assert ("healthcheck" in service) == (name != ONCE)


def test_only_the_api_is_published_and_on_loopback_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(published) == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in published["api"])
    assert [name for name, service in SERVICES.items() if "outside" in service["networks"]] == ["api", "dispatcher"]
    assert COMPOSE["networks"]["inside"]["internal"] is True


def test_a_service_has_longer_to_stop_than_its_work_may_take() -> None:
    for name in OURS:
        seconds = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert seconds >= Settings().drain_seconds + STOP_SECONDS, name


def test_only_workers_have_the_image_with_pytorch() -> None:
    images = {name: (SERVICES[name]["image"], SERVICES[name]["build"]["target"]) for name in OURS}
    assert {name for name, image in images.items() if image == ("timetuner-worker", "worker")} == {
        name for name in OURS if "worker" in name
    }
    assert {images[name] for name in ("api", "dispatcher", ONCE)} == {("timetuner-server", "server")}
    for target, has_torch in (("server", False), ("worker", True)):
        assert f" AS {target}\n" in DOCKERFILE
        assert f"COPY --from={target}-packages /opt/timetuner /opt/timetuner" in DOCKERFILE
        lock = (ROOT / "requirements" / f"{target}.lock").read_text()
        assert bool(re.search(r"^(torch|diffusers|nvidia\S*)==", lock, re.MULTILINE)) == has_torch
        assert not re.search(r"^(pytest|mypy|ruff|hatchling)==", lock, re.MULTILINE)


def test_the_images_of_others_are_named_by_their_digests() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    bases = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    used = {base for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if base not in stages}
    assert used == {f"${{{name}}}" for name in bases}
    theirs = [service["image"] for name, service in SERVICES.items() if name not in OURS]
    assert theirs
    for image in (*bases.values(), *theirs):
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


def test_the_images_have_the_versions_that_are_tested() -> None:
    pin = re.compile(r"^([\w.-]+)==([^ ;\\]+)", re.MULTILINE)
    tested = dict(pin.findall((ROOT / "requirements.lock").read_text()))
    for lock in sorted((ROOT / "requirements").iterdir()):
        pins = dict(pin.findall(lock.read_text()))
        assert pins
        assert {name: version for name, version in pins.items() if tested.get(name) != version} == {}, lock.name


@pytest.mark.parametrize("password", ["p@ss", "100%", "a:b/c#d?e"])
def test_any_password_of_the_database_is_taken_as_it_is(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = SERVICES["api"]["environment"]
    for name in ("DATABASE_URL", "PGPASSWORD"):
        monkeypatch.setenv(name, re.sub(r"\$\{POSTGRES_PASSWORD[^}]*\}", lambda _: password, environment[name]))
    url = make_url(Settings().database_url)
    assert (url.username, url.host, url.database) == ("timetuner", "postgres", "timetuner")
    _, options = PGDialect_psycopg().create_connect_args(url)
    defaults = {option.keyword.decode(): option.val for option in Conninfo.get_defaults()}
    assert options.get("password", (defaults["password"] or b"").decode()) == password


def test_no_secret_is_written_down() -> None:
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "Dockerfile").read_text()
    written = re.sub(r"\$\{[^}]*\}", "", text)  # The rest comes from the environment.
    assert not re.search(r"(?i)(password|secret|token)\w*[:=] *[^\s.]", written)
    assert not re.search(r"://[^\s/]+:[^\s/]+@", written)


def test_the_image_gets_what_it_needs_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert sent == set(" ".join(copied).split())


@pytest.fixture(scope="module")
def deployment(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Deployment"]:
    with ExitStack() as stopped_at_the_end:
        yield Deployment(
            make_database_url("postgresql", tmp_path_factory.mktemp("home"), empty=True), stopped_at_the_end
        )


class Deployment:
    """The commands of docker-compose.yml as processes here, in its order, with its environment but for addresses."""

    def __init__(self, database_url: str, stopped_at_the_end: ExitStack) -> None:
        home = Path(stopped_at_the_end.enter_context(TemporaryDirectory(prefix="timetuner-test-")))
        command, broker_socket = valkey_command(home)
        self.database_url = database_url
        self.broker_url = f"redis+socket://{broker_socket}"
        self.home = home
        self.ports = {name: free_port() for name in RUN_HERE}
        self.processes: dict[str, Process] = {}
        stopped_at_the_end.callback(self.stop)
        self.processes["valkey"] = subprocess.Popen(command)
        wait_until(broker_socket.exists, "broker")
        migrate = self._here(SERVICES[ONCE]["command"], ONCE)
        forked.run(migrate, self._environment(ONCE)).check_returncode()
        for name in RUN_HERE:
            self.processes[name] = forked.start(self._here(SERVICES[name]["command"], name), self._environment(name))

    def is_healthy(self, name: str) -> bool:
        """The answer of the service's health check."""
        assert self.processes[name].poll() is None, f"{name} ended"
        kind, *check = SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD"
        command = self._here(shlex.join(check), name)
        checked = subprocess.run(command, env=self._environment(name), stderr=subprocess.DEVNULL, check=False)
        return checked.returncode == 0

    def key(self) -> str:
        """An API key, made as the file says."""
        command = self._here("timetuner keys create --name admin --scope admin", "api")
        made = forked.run(command, self._environment("api"))
        made.check_returncode()
        return made.stdout.strip()

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            process.wait(120)

    def _here(self, command: str, name: str) -> list[str]:
        programs = {"timetuner": [sys.executable, "-m", "service"], "python": [sys.executable]}
        program, *arguments = shlex.split(command)
        port = str(self.ports.get(name, ""))
        return [*programs[program], *(re.sub(r"\b(8000|9100)\b", port, argument) for argument in arguments)]

    def _environment(self, name: str) -> dict[str, str]:
        """The service's own, with values that are left to whoever runs it at their defaults."""
        given = {key: re.sub(r"\$\{\w+:-(\w*)\}", r"\1", value) for key, value in SERVICES[name]["environment"].items()}
        given |= {"DATABASE_URL": self.database_url, "BROKER_URL": self.broker_url, "OMP_NUM_THREADS": "1"}
        given |= {"ARTIFACTS_URL": f"file://{self.home / 'artifacts'}"}
        for port in given.keys() & {"METRICS_PORT", "DISPATCHER_METRICS_PORT"}:
            given |= {port: str(self.ports[name]), "METRICS_HOST": "127.0.0.1"}
        kept = {
            key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH", "HOME", "LD_LIBRARY_PATH")
        }
        return {**kept, **given}


@pytest.mark.parametrize("name", RUN_HERE)
def test_a_service_becomes_healthy(deployment: Deployment, name: str) -> None:
    wait_until(lambda: deployment.is_healthy(name), f"health of {name}")


def test_all_of_them_together_serve(deployment: Deployment) -> None:
    url = f"http://127.0.0.1:{deployment.ports['api']}"
    with httpx.Client(base_url=url, timeout=120, headers={"Authorization": f"Bearer {deployment.key()}"}) as client:

        def answers() -> bool:
            try:
                return client.get("/readyz").is_success
            except httpx.TransportError:
                return False

        wait_until(answers, "readiness")
        model = client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
        samples = client.post(
            "/v1/samples", json={"model": model, "num_steps": 2}, headers={"Accept": "application/json"}
        )
        assert samples.status_code == 200, samples.text


def test_all_of_them_end_with_status_0_when_they_are_stopped(deployment: Deployment) -> None:
    for name in RUN_HERE:
        wait_until(partial(deployment.is_healthy, name), f"health of {name}")
    deployment.stop()
    assert {name: process.poll() for name, process in deployment.processes.items()} == dict.fromkeys(
        deployment.processes, 0
    )


def test_every_service_of_ours_is_run_here_or_is_a_twin_of_one_that_is() -> None:
    twins = {f"{name}-cpu": name for name in OURS if f"{name}-cpu" in OURS}
    assert set(OURS) == {*RUN_HERE, ONCE, *twins.values()}
    for on_cpu, on_gpu in twins.items():
        assert SERVICES[on_cpu]["command"] == SERVICES[on_gpu]["command"]
        (device,) = SERVICES[on_gpu]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
