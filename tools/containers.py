"""Build the images, run docker-compose.yml with them, and use what runs: without Docker and without a hub of images.

    make containers                                     # builds, walks, prints figures, and removes what it made
    python tools/containers.py --store FOLDER           # keeps the images there, and uses those that are there

Needs root on Debian and `apt-get install buildah podman runc mmdebstrap netavark aardvark-dns catatonit`. Packages of
Debian stand in for the images of hubs: a minimal system with Python 3.11, and PostgreSQL, and Redis named Valkey.
The storage driver is `overlay`; set STORAGE_DRIVER=vfs where the kernel refuses that, which needs far more room.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[1]
BASE, STAND_IN = "localhost/python-of-debian", "localhost/postgresql-and-redis-of-debian"
SUITE = "bookworm"
PYTHON_PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
SERVER_PACKAGES = "postgresql-15,redis-server"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PIP_SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT")
# Resource limits that a container may set even where the machine allows none to be raised.
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000")
PASSWORD = "p@ss%41/word:#?&"  # noqa: S105 (The walk's own. Each of its marks has a meaning in a URL.)
HEALTH_SECONDS = 300.0
JOB_SECONDS = 600.0
FORBIDDEN_IN_SERVER = ("torch", "nvidia", "triton", "diffusers")
DEVELOPMENT_TOOLS = ("pip", "pytest", "mypy", "ruff", "hatchling", "playwright")
# The official image's entry point makes a database of these variables, and so does this one.
START_POSTGRESQL = """
export PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data/pgdata
if [ ! -e "$PGDATA" ]; then
    printf %s "$POSTGRES_PASSWORD" > /tmp/password
    initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust --auth-host=scram-sha-256 \\
        --locale=C.UTF-8 --no-sync
    rm /tmp/password
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    pg_ctl --wait --options="-c listen_addresses=''" start
    createdb --username="$POSTGRES_USER" "$POSTGRES_DB"
    pg_ctl --wait stop
fi
exec postgres -c listen_addresses='*'
"""

# `run` gives these to the engine, and the script does the others itself. Another key of a service is an error.
GIVEN = {"image", "user", "read_only", "cap_drop", "security_opt", "pids_limit", "mem_limit", "shm_size", "tmpfs"}
GIVEN |= {"environment", "volumes", "networks", "command", "init", "ports", "healthcheck", "restart"}
DONE_HERE = {"build", "depends_on", "profiles", "deploy", "stop_grace_period", "scale"}

Service = dict[str, Any]


def wait_until(condition: Callable[[], Any], what: str, seconds: float) -> float:
    """Wait for a truthy `condition()`; returns how many seconds that took."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"no {what} within {seconds:.0f} s")
        time.sleep(0.3)
    return time.monotonic() - started


class Engine:
    """buildah and podman with a store of their own."""

    def __init__(self, store: Path) -> None:
        self.store = store
        driver = os.environ.get("STORAGE_DRIVER", "overlay")
        self._options = [f"--root={store / 'root'}", f"--runroot={store / 'run'}", f"--storage-driver={driver}"]
        # No systemd need run here: `healthy` runs the checks, which podman would have a timer of systemd do.
        self._environment = {**os.environ, "DISABLE_HC_SYSTEMD": "true"}

    def buildah(self, *arguments: str, timeout: float = 3600) -> None:
        self._run(["buildah", *self._options, *arguments], timeout, capture=False)

    def podman(self, *arguments: str, timeout: float = 120, check: bool = True, input: str = "") -> str:
        options = [*self._options, f"--network-config-dir={self.store / 'networks'}", "--runtime=runc"]
        return self._run(["podman", *options, *arguments], timeout, capture=True, check=check, input=input).strip()

    def succeeds(self, *arguments: str) -> bool:
        """Whether a command of podman's ends with status 0."""
        try:
            self.podman(*arguments)
        except subprocess.CalledProcessError:
            return False
        return True

    def has_image(self, name: str) -> bool:
        return self.succeeds("image", "exists", name)

    def remove(self) -> None:
        """Remove all containers, networks and volumes; images stay."""
        self.podman("rm", "--all", "--force", "--time=5", "--volumes", check=False)
        self.podman("network", "prune", "--force", check=False)
        self.podman("volume", "prune", "--force", check=False)

    def _run(self, command: list[str], timeout: float, *, capture: bool, check: bool = True, input: str = "") -> str:
        done = subprocess.run(
            command,
            env=self._environment,
            timeout=timeout,
            text=True,
            input=input,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.PIPE if capture else None,
            check=False,
        )
        if check and done.returncode:
            message = f"{shlex.join(command)}: status {done.returncode}\n{done.stdout or ''}{done.stderr or ''}"
            raise subprocess.CalledProcessError(done.returncode, message)
        return done.stdout or ""


def make_system(engine: Engine, name: str, packages: str, *hooks: str) -> None:
    """Import a minimal Debian as an image, without manuals and translations, as the hubs' slim images are."""
    without = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "info", "locale", "man")]
    archive = engine.store / "system.tar"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", *without]
    subprocess.run([*command, *(f"--customize-hook={hook}" for hook in hooks), SUITE, str(archive)], check=True)
    path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    engine.podman("import", "--quiet", f"--change={path}", str(archive), name, timeout=600)
    archive.unlink()


def make_stand_ins(engine: Engine) -> None:
    """Make the base of our images, and an image with PostgreSQL and Redis, unless the store has them."""
    if not engine.has_image(BASE):
        make_system(engine, BASE, PYTHON_PACKAGES)
    if not engine.has_image(STAND_IN):
        make_system(
            engine,
            STAND_IN,
            SERVER_PACKAGES,
            # The official image's user has this number, and owns the volume.
            'chroot "$1" sh -c "usermod --uid 70 postgres; groupmod --gid 70 postgres"',
            'install --directory --owner=70 --group=70 --mode=700 "$1/var/lib/postgresql/data"',
            'for name in server cli; do ln -s redis-$name "$1/usr/bin/valkey-$name"; done',
        )


def build(engine: Engine, target: str) -> float:
    """Build one of our images with this machine's settings of pip; returns the seconds it took."""
    settings = engine.store / "pip.conf"
    given = [
        f"{name[4:].lower().replace('_', '-')} = {os.environ[name]}" for name in PIP_SETTINGS if name in os.environ
    ]
    settings.write_text("\n".join(["[global]", f"cert = {CERTIFICATES}", *given]) + "\n")
    started = time.monotonic()
    engine.buildah(
        "bud",
        "--quiet",
        "--format=docker",  # The other format has no health checks.
        "--isolation=chroot",
        "--pull=never",
        f"--build-arg=PYTHON={BASE}",
        f"--volume={settings}:/etc/pip.conf:ro",
        f"--volume={os.environ.get('SSL_CERT_FILE', CERTIFICATES)}:{CERTIFICATES}:ro",
        f"--target={target}",
        f"--tag=timetuner-{target}",
        str(ROOT),
    )
    return time.monotonic() - started


def size(engine: Engine, image: str) -> int:
    return int(engine.podman("image", "inspect", "--format={{.Size}}", image))


def packages(engine: Engine, image: str) -> set[str]:
    """The top-level names that Python finds in the image, tools of Debian's own Python included."""
    listing = "import pkgutil; print(*(module.name for module in pkgutil.iter_modules()))"
    command = ["run", "--rm", "--network=none", *LIMITS, "--entrypoint=python", image, "-c", listing]
    return set(engine.podman(*command).split())


class Deployment:
    """The services of docker-compose.yml as containers. A service that is scaled has several."""

    def __init__(self, engine: Engine, values: dict[str, str], profile: str) -> None:
        def value_of(match: re.Match[str]) -> str:
            name, operator, rest = match["name"], match["operator"], match["rest"]
            if not values.get(name) and operator == ":?":
                raise KeyError(f"{name}: {rest}")
            return values.get(name) or rest

        def interpolated(part: Any) -> Any:
            if isinstance(part, dict):
                return {key: interpolated(value) for key, value in part.items()}
            if isinstance(part, list):
                return [interpolated(item) for item in part]
            return variable.sub(value_of, part) if isinstance(part, str) else part

        variable = re.compile(r"\$\{(?P<name>\w+)(?P<operator>:[-?])(?P<rest>[^}]*)\}")
        compose = interpolated(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))
        self.engine = engine
        self.services: dict[str, Service] = {
            name: service
            for name, service in compose["services"].items()
            if profile in service.get("profiles", [profile])
        }
        self.networks: dict[str, dict[str, Any] | None] = compose["networks"]
        for name, service in self.services.items():
            if unknown := service.keys() - GIVEN - DONE_HERE:
                raise ValueError(f"{name}: this script does not know {', '.join(sorted(unknown))}")

    def containers(self, service: str) -> list[str]:
        count = self.services[service].get("scale", 1)
        return [service] if count == 1 else [f"{service}-{number}" for number in range(1, count + 1)]

    def make_networks(self) -> None:
        for name, options in self.networks.items():
            internal = ["--internal"] if (options or {}).get("internal") else []
            self.engine.podman("network", "create", *internal, name)

    def start(self, service: str) -> None:
        for number, name in enumerate(self.containers(service)):
            self.engine.podman("run", "--detach", *self._arguments(service, name, number))

    def run_to_its_end(self, service: str) -> str:
        return self.engine.podman("run", "--rm", *self._arguments(service, service, 0), timeout=300)

    def wait_until_healthy(self, service: str) -> float:
        """Run the health checks until all succeed; returns the seconds that took."""
        names = self.containers(service)
        return wait_until(
            lambda: all(self.engine.succeeds("healthcheck", "run", name) for name in names),
            f"health of {service}",
            HEALTH_SECONDS,
        )

    def stop(self, name: str, service: str) -> tuple[float, int]:
        """Stop a container as Compose does; returns the seconds that took and the exit status."""
        grace = self.grace_seconds(service)
        started = time.monotonic()
        self.engine.podman("stop", f"--time={grace}", name, timeout=grace + 60)
        seconds = time.monotonic() - started
        return seconds, int(self.engine.podman("inspect", "--format={{.State.ExitCode}}", name))

    def grace_seconds(self, service: str) -> int:
        return int(self.services[service].get("stop_grace_period", "10s").removesuffix("s"))

    def _arguments(self, service: str, name: str, number: int) -> list[str]:
        """The options of `podman run` for a service's container."""
        asked = self.services[service]
        arguments = [
            f"--name={name}",
            f"--network={','.join(asked['networks'])}",
            f"--network-alias={service}",
            *LIMITS,
        ]
        single = {"user": "user", "pids_limit": "pids-limit", "mem_limit": "memory", "shm_size": "shm-size"}
        single |= {"restart": "restart"}
        arguments += [f"--{option}={asked[key]}" for key, option in single.items() if key in asked]
        several = {"cap_drop": "cap-drop", "security_opt": "security-opt", "tmpfs": "tmpfs", "volumes": "volume"}
        arguments += [f"--{option}={value}" for key, option in several.items() for value in asked.get(key, [])]
        arguments += [f"--env={key}={value}" for key, value in asked.get("environment", {}).items()]
        arguments += ["--init"] if asked.get("init") else []
        arguments += ["--read-only", "--read-only-tmpfs=false"] if asked.get("read_only") else []
        for port in asked.get("ports", []):
            address, published, inner = port.rsplit(":", 2)
            arguments.append(f"--publish={address}:{int(published.partition('-')[0]) + number}:{inner}")
        if check := asked.get("healthcheck"):
            assert check["test"][0] == "CMD"
            # Podman 4 divides the option at each space, quoted or not, and a shell joins it again.
            arguments.append(f"--health-cmd=CMD-SHELL {shlex.join(check['test'][1:])}")
            arguments.append(f"--health-timeout={check.get('timeout', '30s')}")
            arguments += [f"--health-retries={check.get('retries', 3)}", "--health-interval=disable"]
        command = asked.get("command", [])
        command = shlex.split(command) if isinstance(command, str) else command
        if asked["image"].startswith("timetuner-"):
            return [*arguments, f"localhost/{asked['image']}", *command]
        if service == "postgres":
            return [*arguments, "--entrypoint=sh", STAND_IN, "-c", START_POSTGRESQL]
        return [*arguments, STAND_IN, *command]


def job_of(client: httpx.Client, kind: str, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = client.get(f"/v1/{kind}/{job_id}").raise_for_status().json()
    return job


def finish(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The tuning job once it is over."""
    wait_until(lambda: job_of(client, "tuning-jobs", job_id)["finished_at"], f"end of {job_id}", JOB_SECONDS)
    job = job_of(client, "tuning-jobs", job_id)
    expect(job["state"] == "succeeded", f"the job has {job['state']}: {job}")
    return job


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(otherwise)


def tell(what: str, figure: str = "yes") -> None:
    print(f"| {what} | {figure} |", flush=True)


def report_images(engine: Engine) -> None:
    for image in (BASE, "localhost/timetuner-server", "localhost/timetuner-worker"):
        tell(f"size of {image.removeprefix('localhost/')}, MB", f"{size(engine, image) / 1e6:,.0f}")
    for target, forbidden in (("server", (*FORBIDDEN_IN_SERVER, *DEVELOPMENT_TOOLS)), ("worker", DEVELOPMENT_TOOLS)):
        found = packages(engine, f"localhost/timetuner-{target}") & set(forbidden)
        expect(not found, f"the image {target} has {found}")
        tell(f"packages of timetuner-{target} that it must not have", "none")


def walk(engine: Engine) -> None:
    """Start the services in the order that they ask for, use them, and stop them."""
    deployment = Deployment(engine, {"POSTGRES_PASSWORD": PASSWORD}, "cpu")
    deployment.make_networks()
    for service in ("postgres", "valkey"):
        deployment.start(service)
        tell(f"{service} healthy after, s", f"{deployment.wait_until_healthy(service):.1f}")
    deployment.run_to_its_end("migrate")
    tell(f"migrated; the password is `{PASSWORD}`")
    processes = ("api", "dispatcher", "sampling-worker-cpu", "tuning-worker-cpu")
    for service in processes:
        deployment.start(service)
    for service in processes:
        tell(f"{service} healthy after, s", f"{deployment.wait_until_healthy(service):.1f}")
    for name in (name for service in processes for name in deployment.containers(service)):
        check_confinement(engine, name)
    tell("not root, no capabilities, none to be had, nothing writable but /data and /tmp")
    tell("no route to elsewhere but for API and dispatcher")
    key = engine.podman("exec", "api-1", *shlex.split("timetuner keys create --name admin --scope admin"))
    headers = {"Authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url="http://127.0.0.1:8000", headers=headers, timeout=120) as client,
        httpx.Client(base_url="http://127.0.0.1:8001", headers=headers, timeout=120) as other,
    ):
        expect(httpx.get("http://127.0.0.1:8000/v1/models").status_code == 401, "no API key was asked for")
        seconds = wait_until(lambda: client.get("/readyz").is_success, "readiness", HEALTH_SECONDS)
        tell("ready after, s, beside that", f"{seconds:.1f}")
        use(deployment, client, other)
    for service in ("sampling-worker-cpu", "dispatcher", "api", "valkey", "postgres"):
        for name in deployment.containers(service):
            stop(deployment, name, service)
    logs = engine.podman("logs", "api-1") + engine.podman("logs", "dispatcher")
    expect(PASSWORD not in logs, "the password is in the logs")


def use(deployment: Deployment, client: httpx.Client, other: httpx.Client) -> None:
    """Tune and sample by one replica of the API, then by the other, while the worker is replaced."""
    model = client.post("/v1/models", json={"builtin": "mixture-ring"}).raise_for_status().json()["id"]
    body = {"model": model, "num_steps": 5, "tuner": {"total_iters": 40}, "evaluation": {"num_samples": 128}}
    started = time.monotonic()
    job = finish(client, client.post("/v1/tuning-jobs", json=body).raise_for_status().json()["id"])
    state = client.get(f"/v1/schedules/{job['schedule']}").raise_for_status().json()["status"]
    tell("tuned in, s; the schedule is", f"{time.monotonic() - started:.1f}; {state}")
    request = {"model": model, "num_steps": 5, "num_images": 4, "seed": 1, "schedule": "auto"}
    answers = [
        api.post("/v1/samples", json=request, headers={"Accept": "application/x-npy"}) for api in (client, other)
    ]
    expect(all(answer.is_success for answer in answers), f"no samples: {answers[0].text}")
    sampled = [job_of(client, "samples", answer.headers["Content-Location"].split("/")[3]) for answer in answers]
    wanted = job["schedule"] if state == "accepted" else None
    expect(all(each["schedule"] == wanted for each in sampled), f"auto took {sampled[0]['schedule']}, not {wanted}")
    expect(answers[0].content == answers[1].content, "the two replicas of the API answered differently")
    tell(f"`auto` took {wanted or 'no schedule'}; both replicas of the API answer the same")

    def has_begun() -> bool:
        return any(step["iterations"] for step in job_of(client, "tuning-jobs", long)["steps"])

    body |= {"seed": 1, "tuner": {"total_iters": 4000}}
    long = client.post("/v1/tuning-jobs", json=body).raise_for_status().json()["id"]
    wait_until(has_begun, "progress", JOB_SECONDS)
    stop(deployment, "tuning-worker-cpu", "tuning-worker-cpu")
    state = job_of(client, "tuning-jobs", long)["state"]
    expect(state == "queued", f"the stopped worker's job is {state}")
    deployment.engine.podman("start", "tuning-worker-cpu")
    wait_until(lambda: job_of(client, "tuning-jobs", long)["state"] == "running", "new start of the job", JOB_SECONDS)
    client.post(f"/v1/tuning-jobs/{long}/cancel").raise_for_status()
    wait_until(lambda: job_of(client, "tuning-jobs", long)["finished_at"], "end of the job", JOB_SECONDS)
    tell("a stopped worker's job went on after the worker was started again")
    stop(deployment, "tuning-worker-cpu", "tuning-worker-cpu")


def stop(deployment: Deployment, name: str, service: str) -> None:
    seconds, status = deployment.stop(name, service)
    tell(f"{name} stopped in, s, of {deployment.grace_seconds(service)}; status", f"{seconds:.1f}; {status}")
    expect(seconds < deployment.grace_seconds(service), f"{name} was killed")
    expect(status == 0, f"{name} ended with status {status}")


def check_confinement(engine: Engine, name: str) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in engine.podman("exec", name, "cat", "/proc/self/status").splitlines()
        if ":\t" in line
    )
    expect(status["Uid"].split() == ["10001"] * 4, f"{name} runs as {status['Uid']}")
    expect(int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, f"{name} has capabilities")
    expect(status["NoNewPrivs"].strip() == "1", f"{name} may gain privileges")
    for folder in ("/", "/etc", "/opt/timetuner", "/var"):
        expect(not engine.succeeds("exec", name, "touch", f"{folder}/written"), f"{name} can write to {folder}")
    routes = [line.split()[1] for line in engine.podman("exec", name, "cat", "/proc/net/route").splitlines()[1:]]
    expect(("00000000" in routes) == (not name.endswith("-cpu")), f"{name} has the routes {routes}")


def walk_in_one(engine: Engine) -> None:
    """The worker image's own command, `timetuner up`, in a container of its own."""
    confined = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--user=10001", "--tmpfs=/tmp:mode=1777"]
    engine.podman(
        *("run", "--detach", "--init", "--name=all", *LIMITS, *confined, "--publish=127.0.0.1:8000:8000"),
        *("--network=outside", "--volume=all:/data", "localhost/timetuner-worker"),
    )
    seconds = wait_until(
        lambda: engine.succeeds("healthcheck", "run", "all"), "health of the container", HEALTH_SECONDS
    )
    tell("`timetuner up` in one container healthy after, s", f"{seconds:.1f}")
    key = engine.podman("exec", "all", *shlex.split("timetuner keys create --name admin --scope admin"))
    with httpx.Client(base_url="http://127.0.0.1:8000", timeout=120) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        wait_until(lambda: client.get("/readyz").is_success, "readiness", HEALTH_SECONDS)
        model = client.post("/v1/models", json={"builtin": "mixture-ring"}).raise_for_status().json()["id"]
        request = {"model": model, "num_steps": 5, "num_images": 4, "seed": 1}
        client.post("/v1/samples", json=request, headers={"Accept": "application/x-npy"}).raise_for_status()
    started = time.monotonic()
    engine.podman("stop", "--time=60", "all")
    status = engine.podman("inspect", "--format={{.State.ExitCode}}", "all")
    tell("it samples; stopped in, s; status", f"{time.monotonic() - started:.1f}; {status}")
    expect(status == "0", f"the container ended with status {status}")


@contextmanager
def engine_in(store: Path | None) -> Iterator[Engine]:
    """An engine, whose containers are removed at the end, and its images too unless `store` is given."""
    folder = store or Path(tempfile.mkdtemp(prefix="timetuner-containers-", dir="/var/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(folder)
    engine.remove()
    try:
        yield engine
    finally:
        engine.remove()
        if store is None:
            engine.podman("rmi", "--all", "--force", check=False, timeout=600)
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="a folder whose images are used, and kept")
    parser.add_argument("--rebuild", action="store_true", help="build our images although the store has them")
    args = parser.parse_args()
    with engine_in(args.store) as engine:
        make_stand_ins(engine)
        for target in ("server", "worker"):
            if args.rebuild or not engine.has_image(f"localhost/timetuner-{target}"):
                tell(f"built {target} in, s", f"{build(engine, target):.0f}")
        try:
            report_images(engine)
            walk(engine)
            walk_in_one(engine)
        except Exception:
            for name in engine.podman("ps", "--all", "--format={{.Names}}").split():
                print(f"--- {name}\n{engine.podman('logs', '--tail=30', name, check=False)}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
