"""The faults of `make chaos`: what each does to a running deployment, and what is noted of it."""

import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGTERM
from subprocess import TimeoutExpired

import httpx
import psutil
import psycopg
from sqlalchemy import select

from service.registry.tables import JobState, SampleJob
from tests.stack import Stack, wait_until

KILLED = ("api", "dispatcher", "worker", "worker 2", "worker 3")
STOPPED = ("api", "dispatcher", "worker")
LOCK_SECONDS = 20.0
HEALTH_SECONDS = 5.0
CUT_SECONDS = 30.0
# Compose gives a container this long between SIGTERM and SIGKILL; DRAIN_SECONDS is shorter.
GRACE_SECONDS, DRAIN_SECONDS = 60.0, 20.0
LOOK_SECONDS = 0.3
# Files that others leave among the artifacts: a network file system, a file system check, an editor, a person.
FOREIGN = ("samples/.nfs000000000001", "samples/lost+found/1", "samples/notes.txt", "samples/x.npy", "partial/x~")

# An installed sampler. The worker that finds the file `hang` renames it, and its step never ends.
HANGING = """
import os
import time
from pathlib import Path

from timetuner_core.samplers import Sampler

HOME = Path(os.environ["TIMETUNER_HOME"])


def update(step):
    try:
        (HOME / "hang").rename(HOME / f"hung-{time.time_ns()}")
    except FileNotFoundError:
        pass
    else:
        time.sleep(86_400)
    prediction = step.predict(step.x_t, step.t)
    return step.first_order(prediction), prediction.x0


SAMPLER = Sampler("own_hanging", update, order=1)
"""


class Faults:
    """Does one fault after the other, and starts processes again that ended, as a container engine does.

    Attributes:
        ended: which processes ended by themselves, and how often.
        cut: the artifacts that were cut.
        killed_late: how many processes were still there when their time to stop was over.
        unanswered: how often `/healthz` did not answer in time while the database was locked.
    """

    def __init__(self, stack: Stack, draws: random.Random) -> None:
        self.stack = stack
        self.draws = draws
        self.ended: Counter[str] = Counter()
        self.cut: set[str] = set()
        self.killed_late = 0
        self.unanswered = 0
        self._starting = threading.Lock()

    @contextmanager
    def processes_started_again(self) -> Iterator[None]:
        """Start each process of the deployment again whenever it has ended, until the end of the context."""
        over = threading.Event()
        thread = threading.Thread(target=self._start_again, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _start_again(self, over: threading.Event) -> None:
        while not over.wait(LOOK_SECONDS):
            with self._starting:
                for name, process in list(self.stack.processes.items()):
                    if process.poll() is not None:
                        self.ended[f"{name} with status {process.returncode}"] += 1
                        self.stack.start(name)

    def kill_process(self) -> str:
        name = self.draws.choice(KILLED)
        self._kill(name)
        return f"{name} killed"

    def empty_broker(self) -> str:
        self._kill("broker")
        return "broker killed, and empty again"

    def kill_child_of_up(self) -> str:
        """Kill one of the processes that `timetuner up` watches. It is to start it again by itself."""
        up = psutil.Process(self.stack.processes["up"].pid)
        children = [child for child in up.children() if child.status() != psutil.STATUS_ZOMBIE]
        if not children:
            return "no child of `up` there"
        child = self.draws.choice(children)
        with suppress(psutil.NoSuchProcess):
            arguments = child.cmdline()
            child.kill()
            return f"`up`'s {'API' if 'api' in arguments else arguments[-1]} killed"
        return "no child of `up` there"

    def stop_process(self) -> str:
        """Stop a process group as `podman stop` stops a container: SIGTERM, and SIGKILL when its time is over."""
        name = self.draws.choice(STOPPED)
        with self._starting:
            process = self.stack.processes[name]
            process.send_signal(SIGTERM)
            try:
                process.wait(GRACE_SECONDS)
            except TimeoutExpired:
                self.killed_late += 1
                process.kill()
                process.wait()
            self.stack.start(name)
        return f"{name} stopped"

    def hang_step(self) -> str:
        """The next step of the sampler `own_hanging`, in whichever worker, hangs."""
        (self.stack.home / "hang").touch()
        return "step hangs"

    def num_hung(self) -> int:
        return len(list(self.stack.home.glob("hung-*")))

    def cut_sample_file(self) -> str:
        """Cut a file of finished samples."""
        return self._cut("sample file cut", lambda job: job.parent_id is None)

    def cut_part(self) -> str:
        """Cut a part of a large request, before the parts are joined if one is found in time."""
        with suppress(AssertionError):
            return wait_until(lambda: self._cut("", self._waits_to_be_joined), "part", CUT_SECONDS) and "part cut"
        return self._cut("joined part cut", lambda job: job.parent_id is not None)

    def add_foreign_file(self) -> str:
        path = self.stack.home / "artifacts" / self.draws.choice(FOREIGN)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.draws.randbytes(100))
        return "foreign file among the artifacts"

    def lock_database(self) -> str:
        """Keep a lock that nobody can write beside, and see whether the API is still called healthy."""
        self._is_healthy(60)
        with _locked(self.stack):
            until = time.monotonic() + LOCK_SECONDS
            while time.monotonic() < until:
                self.unanswered += not self._is_healthy(HEALTH_SECONDS)
                time.sleep(1)
        return f"database locked for {LOCK_SECONDS:.0f} s"

    def _is_healthy(self, seconds: float) -> bool:
        """Whether `/healthz` answers 200 within that time; until then it is asked again if nothing listens yet."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            with suppress(httpx.TransportError):
                return self.stack.client.get("/healthz", timeout=left).status_code == 200
            time.sleep(0.1)
        return False

    def _kill(self, name: str) -> None:
        with self._starting:
            process = self.stack.processes[name]
            process.kill()
            process.wait()
            self.stack.start(name)

    def _cut(self, what: str, is_wanted: Callable[[SampleJob], bool]) -> str:
        """Cut the file of a random finished job that is wanted; returns "" if there is none."""
        with self.stack.registry.read() as session:
            done = session.scalars(select(SampleJob).where(SampleJob.artifact.is_not(None)))
            artifacts = sorted({job.artifact for job in done if job.artifact and is_wanted(job)} - self.cut)
        self.draws.shuffle(artifacts)
        for artifact in artifacts:
            path = Path(self.stack.home, "artifacts", artifact)
            with suppress(FileNotFoundError), path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
                self.cut.add(artifact)
                return what or artifact
        return f"no {what}" if what else ""

    def _waits_to_be_joined(self, job: SampleJob) -> bool:
        if job.parent_id is None:
            return False
        with self.stack.registry.read() as session:
            return session.get_one(SampleJob, job.parent_id).state not in (JobState.SUCCEEDED, JobState.FAILED)


@contextmanager
def _locked(stack: Stack) -> Iterator[None]:
    url = stack.registry.url
    if stack.registry.is_sqlite:
        connection = sqlite3.connect(str(url.database), timeout=60, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
        connection.close()
        return
    with psycopg.connect(stack.registry.url.set(drivername="postgresql").render_as_string(False)) as session:
        session.execute("LOCK TABLE sample_jobs, tuning_jobs, models IN ACCESS EXCLUSIVE MODE")
        yield
        session.rollback()
