"""Whether anything accepted is lost, done twice or left undone while parts fail at random.

    make chaos                                                    # both engines
    python -m tests.chaos --jobs 300 --database sqlite --seed 0

A whole deployment with three workers, and beside it a `timetuner up` with the same registry. Clients submit tuning and
sampling jobs, each with an Idempotency-Key, again and again until it is accepted. Meanwhile processes are killed and
stopped, the broker comes back empty, steps hang, files are cut, strange files appear and the database is locked. Then
every job has to end, on its own and as if nothing had happened: one schedule for each tuning job, images for each
request. A large request may fail if a part of it was cut before the parts were joined, and has to say so.
"""

import argparse
import io
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
from sqlalchemy import func, select

from service.registry.tables import FINAL_STATES, JobState, SampleJob, Schedule, TuningJob
from tests.chaos_faults import DRAIN_SECONDS, HANGING, Faults
from tests.stack import Stack, deployment, wait_until

# How often each fault is done, by the number of jobs: so many times in 300.
FAULTS: dict[str, tuple[Callable[[Faults], str], int]] = {
    "kills": (Faults.kill_process, 15),
    "broker-restarts": (Faults.empty_broker, 3),
    "child-kills": (Faults.kill_child_of_up, 5),
    "hangs": (Faults.hang_step, 4),
    "sample-cuts": (Faults.cut_sample_file, 6),
    "part-cuts": (Faults.cut_part, 4),
    "foreign-files": (Faults.add_foreign_file, 5),
    "locks": (Faults.lock_database, 2),
    "stops": (Faults.stop_process, 4),
}
CLIENTS = 4
LARGE = 30  # A request for so many images is split in two.
IMAGES_SECONDS = 120.0
SETTINGS = {
    "DRAIN_SECONDS": f"{DRAIN_SECONDS:g}",
    "LEASE_SECONDS": "15",  # The default. Tests have a shorter one, which processes that compete for cores may miss.
    "DATABASE_LOCK_SECONDS": "5",
    # A step may wait as long as the database is locked, and longer where processes compete for cores.
    "STEP_SECONDS": "30",
    "MAX_STEP_SECONDS": "60",
}
RECOVERY_SECONDS = 1200.0
TUNING = {"num_steps": 4, "tuner": {"total_iters": 20, "population_size": 32}, "evaluation": {"num_samples": 32}}


@dataclass(frozen=True)
class Submitted:
    """A job that was accepted."""

    kind: str  # The kind is also a part of its path.
    id: str
    num_images: int


def submit(stack: Stack, model: str, number: int) -> Submitted:
    """However often it takes, at either API: every fifth a tuning job, the others samples, some of them large."""
    num_images = LARGE if number % 5 == 1 else 4
    kind, body = "samples", {"model": model, "num_steps": 20, "num_images": num_images, "seed": 1000 * number}
    if number % 5 == 0:
        kind, body = "tuning-jobs", {"model": model, "seed": number, **TUNING}
    if number % 5 == 2:
        body["sampler"] = "own_hanging"
    headers = {"Idempotency-Key": uuid4().hex, "Prefer": "respond-async"}
    apis = (f"{stack.client.base_url}", stack.up_url)
    for attempt in range(100_000):
        url = f"{apis[(number + attempt) % len(apis)].rstrip('/')}/v1/{kind}"
        with suppress(httpx.TransportError):
            answer = stack.client.post(url, json=body, headers=headers, timeout=30)
            if answer.status_code == 202:
                return Submitted(kind, answer.json()["id"], num_images)
            if answer.status_code < 500 and answer.status_code != 429:
                raise RuntimeError(f"{kind}: {answer.status_code} {answer.text}")
        time.sleep(0.2)
    raise RuntimeError(f"{kind}: never accepted")


def fail_at_random(faults: Faults, draws: random.Random, args: argparse.Namespace) -> Counter[str]:
    """One fault after the other, evenly over `args.seconds`; how often each was done."""
    planned = [name for name, (_, count) in FAULTS.items() for _ in range(round(count * args.faults))]
    draws.shuffle(planned)
    done: Counter[str] = Counter()
    for name in planned:
        time.sleep(args.seconds / len(planned) * draws.uniform(0.5, 1.5))
        done[FAULTS[name][0](faults)] += 1
    return done


def images_of(stack: Stack, job: Submitted) -> str:
    """What became of a request that succeeded: "as asked for", that after its images were made anew, or a fault."""
    first = ""
    until = time.monotonic() + IMAGES_SECONDS
    while time.monotonic() < until:
        answer = stack.client.get(f"/v1/samples/{job.id}/content", headers={"Accept": "application/x-npy"})
        if answer.status_code == 200:
            images = np.load(io.BytesIO(answer.content))
            is_right = len(images) == job.num_images and np.isfinite(images).all() and images.std() > 0
            return f"as asked for{first}" if is_right else "wrong"
        if answer.status_code not in (409, 503):  # It is being made anew.
            return f"{answer.status_code} {answer.text[:200]}"
        first = ", made anew"
        time.sleep(float(answer.headers.get("Retry-After", "1")))
    return "none in time"


def check(stack: Stack, jobs: list[Submitted], faults: Faults) -> dict[str, Any]:
    """Tell what became of the jobs."""
    tuning = [job.id for job in jobs if job.kind == "tuning-jobs"]
    with stack.registry.read() as session:
        rows = [*session.scalars(select(TuningJob)), *session.scalars(select(SampleJob).filter_by(parent_id=None))]
        parts = session.execute(select(SampleJob.parent_id, SampleJob.artifact).where(SampleJob.parent_id.is_not(None)))
        cut = {parent for parent, artifact in parts if artifact in faults.cut}
        schedules = Counter(session.scalars(select(Schedule.job_id)))
        versions = session.execute(select(func.count(), func.count(Schedule.version.distinct()))).one()
    states = {row.id: row.state for row in rows}
    refused = {row.id for row in rows if row.state == JobState.FAILED and row.id in cut and "damaged" in row.error}
    samples = [job for job in jobs if job.kind == "samples" and job.id not in refused]
    images = Counter(images_of(stack, job) for job in samples)
    right = sum(count for what, count in images.items() if what.startswith("as asked for"))
    return {
        "accepted": len(jobs),
        "made of them": len(rows),
        "lost": sum(job.id not in states for job in jobs),
        "made twice": len(rows) - len(jobs),
        "not over": sum(state not in FINAL_STATES for state in states.values()),
        "failed": [
            f"{row.id}: {row.error}" for row in rows if row.state in ("failed", "cancelled") and row.id not in refused
        ],
        "tuning jobs without a schedule": sum(schedules[job_id] == 0 for job_id in tuning),
        "schedules twice": sum(count > 1 for count in schedules.values()) + versions[0] - versions[1],
        "requests without the images that they asked for": len(samples) - right,
        "images": dict(images),
        "failed, as a part was cut before it was joined": len(refused),
        "files cut": len(faults.cut),
        "steps that hung": faults.num_hung(),
        "ended by themselves": dict(faults.ended),
        "stopped too late": faults.killed_late,
        "health unanswered while the database was locked": faults.unanswered,
        "attempts": sum(row.attempt for row in rows),
    }


# No request may end as one of these.
WRONG = (
    "lost",
    "made twice",
    "not over",
    "failed",
    "tuning jobs without a schedule",
    "schedules twice",
    "requests without the images that they asked for",
    "stopped too late",
    "health unanswered while the database was locked",
)


def run(engine: str, args: argparse.Namespace) -> bool:
    draws = random.Random(args.seed)
    processes = ("worker 2", "worker 3", "up")
    with deployment(engine, *processes, packages={"own_hanging": HANGING}, **SETTINGS) as stack:
        model = stack.register("mixture-gratings")
        faults = Faults(stack, draws)
        began = time.monotonic()

        def at_its_time(number: int) -> Submitted:
            time.sleep(max(0.0, began + number * args.seconds / args.jobs - time.monotonic()))
            return submit(stack, model, number)

        with faults.processes_started_again():
            with ThreadPoolExecutor(CLIENTS + 1) as pool:
                failing = pool.submit(fail_at_random, faults, draws, args)
                jobs = list(pool.map(at_its_time, range(args.jobs)))
                done = failing.result()
            ended = time.monotonic()
            with suppress(AssertionError):  # The result says it better.
                wait_until(lambda: is_over(stack), "end of all jobs", RECOVERY_SECONDS)
            seconds = time.monotonic() - ended
            result = check(stack, jobs, faults)
    print(f"\n**{engine}**, seed {args.seed}: {seconds:.0f} s after the last fault all was over\n")
    for name, count in sorted(done.items()):
        print(f"| {name} | {count} |")
    for name, value in result.items():
        print(f"| {name} | {value} |")
    return not any(result[name] for name in WRONG)


def is_over(stack: Stack) -> bool:
    with stack.registry.read() as session:
        return not any(
            session.scalar(select(func.count()).where(table.state.not_in(FINAL_STATES)))
            for table in (TuningJob, SampleJob)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--faults", type=float, default=1.0, help="how many of them, times the usual number")
    parser.add_argument("--seconds", type=float, default=300.0, help="over which jobs come and faults happen")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(sum(not run(engine, args) for engine in args.database))


if __name__ == "__main__":
    main()
