"""Whether processes grow, or hold ever more connections, over many jobs.

    make soak
    python -m tests.soak --jobs 10000 --database postgresql

Small jobs through the API, every twentieth of them tuning and the others samples; the memory of each process and the
connections to broker and database are read now and then. The first tenth of the jobs is to warm up.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

import psutil
import redis
from sqlalchemy import func, select, text

from service.registry.tables import JobState, SampleJob, TuningJob
from service.shared.signals import redis_url
from tests.stack import Stack, deployment

CLIENTS = 8
LOOKS = 40  # Memory and connections are looked at so often, evenly over the jobs.
MOST_GROWTH = 0.05
TUNER = {"start": "given", "total_iters": 2, "batch_size": 4, "population_size": 4, "teacher_num_steps": 4}
EVALUATION = {"num_samples": 16, "teacher_num_steps": 4}


@dataclass(frozen=True)
class Look:
    """How things were after so many jobs."""

    jobs: int
    megabytes: dict[str, float]
    connections: dict[str, int]


def look(stack: Stack, jobs: int) -> Look:
    broker = redis.Redis.from_url(redis_url(stack.environment["BROKER_URL"]))
    connections = {"broker": len(broker.client_list()) - 1}
    broker.close()
    if not stack.registry.is_sqlite:
        with stack.registry.read() as session:
            others = "SELECT count(*) FROM pg_stat_activity WHERE client_port IS NOT NULL AND pid <> pg_backend_pid()"
            connections["database"] = session.scalar(text(others)) or 0
    return Look(jobs, {name: resident(process.pid) for name, process in stack.processes.items()}, connections)


def resident(pid: int) -> float:
    """Megabytes of a process's memory that are in use."""
    return psutil.Process(pid).memory_info().rss / 2**20


def run_job(stack: Stack, models: list[str], number: int) -> None:
    """Follow a job to its end."""
    model = models[number % len(models)]
    if number % 20:
        body = {"model": model, "num_steps": 1 + number % 2, "num_images": 1 + number % 4, "seed": number}
        stack.client.post("/v1/samples", json=body, headers={"Accept": "application/x-npy"}).raise_for_status()
        return
    job = stack.submit(model, num_steps=2, seed=number, tuner=TUNER, evaluation=EVALUATION)
    while not stack.client.get(f"/v1/tuning-jobs/{job['id']}").raise_for_status().json()["finished_at"]:
        time.sleep(1)


def soak(stack: Stack, count: int) -> list[Look]:
    models = [stack.register(builtin) for builtin in ("mixture-ring", "digits8")]
    looks = []
    with ThreadPoolExecutor(CLIENTS) as clients:
        for first in range(0, count, count // LOOKS):
            numbers = range(first, min(first + count // LOOKS, count))
            list(clients.map(partial(run_job, stack, models), numbers))
            looks.append(look(stack, numbers[-1] + 1))
            print(looks[-1], flush=True)
    return looks


def failures(stack: Stack) -> int:
    """Jobs that did not succeed."""
    with stack.registry.read() as session:
        return sum(
            session.scalar(select(func.count()).where(table.state != JobState.SUCCEEDED)) or 0
            for table in (TuningJob, SampleJob)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    args = parser.parse_args()
    began = time.monotonic()
    with deployment(args.database, LEASE_SECONDS="60", MAX_WAIT_SECONDS="600") as stack:
        looks = soak(stack, args.jobs)
        failed = failures(stack)
    warm = [one for one in looks if one.jobs > args.jobs / 10]
    print(f"\n{args.jobs} jobs on {args.database} in {time.monotonic() - began:.0f} s, {failed} failed\n")
    grown = report("MiB of the {name}", warm, lambda one: one.megabytes)
    report("connections to the {name}", warm, lambda one: one.connections)
    sys.exit(bool(failed) or any(growth > MOST_GROWTH for name, growth in grown.items() if name != "broker"))


def report(
    title: str, looks: list[Look], figures: Callable[[Look], dict[str, float] | dict[str, int]]
) -> dict[str, float]:
    """Print each figure's median over the first and the last tenth of the looks, and its extremes; how each grew."""
    tenth = max(1, len(looks) // 10)
    grown = {}
    for name in figures(looks[0]):
        values = [figures(one)[name] for one in looks]
        first, last = median(values[:tenth]), median(values[-tenth:])
        grown[name] = last / first - 1
        shown = f"{first:.0f} at first, {last:.0f} at last ({grown[name]:+.1%}), {min(values):.0f} to {max(values):.0f}"
        print(f"| {title.format(name=name)} | {shown} |")
    return grown


if __name__ == "__main__":
    main()
