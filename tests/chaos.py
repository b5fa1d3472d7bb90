"""Whether anything accepted is lost or done twice while processes are killed at random.

    make chaos                                                    # both engines
    python -m tests.chaos --jobs 300 --kills 30 --broker-restarts 5 --database sqlite --seed 0

A whole deployment with three workers. Clients submit tuning and sampling jobs, each with an Idempotency-Key, again and
again until it is accepted; meanwhile processes get SIGKILL and are started anew, and the broker comes back empty. Then
every job has to end, on its own and as if nothing had happened: one schedule for each tuning job, images for each
request.
"""

import argparse
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from signal import SIGKILL
from typing import Any
from uuid import uuid4

import httpx
from sqlalchemy import func, select

from service.registry.tables import FINAL_STATES, SampleJob, Schedule, TuningJob
from tests.stack import Stack, deployment, wait_until

KILLED = ("api", "dispatcher", "worker", "worker 2", "worker 3")
CLIENTS = 4
RECOVERY_SECONDS = 1200.0
TUNING = {"num_steps": 4, "tuner": {"total_iters": 20, "population_size": 32}, "evaluation": {"num_samples": 32}}


@dataclass(frozen=True)
class Submitted:
    """A job that was accepted."""

    kind: str  # The kind is also a part of its path.
    id: str


def submit(stack: Stack, model: str, number: int) -> Submitted:
    """However often it takes: every fifth a tuning job, the others samples."""
    kind, body = "samples", {"model": model, "num_steps": 20, "num_images": 4, "seed": 1000 * number}
    if number % 5 == 0:
        kind, body = "tuning-jobs", {"model": model, "seed": number, **TUNING}
    headers = {"Idempotency-Key": uuid4().hex, "Prefer": "respond-async"}
    while True:
        try:
            answer = stack.client.post(f"/v1/{kind}", json=body, headers=headers, timeout=30)
            if answer.status_code == 202:
                return Submitted(kind, answer.json()["id"])
            if answer.status_code < 500 and answer.status_code != 429:
                raise RuntimeError(f"{kind}: {answer.status_code} {answer.text}")
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def kill_at_random(stack: Stack, draws: random.Random, args: argparse.Namespace) -> Counter[str]:
    """One after the other, evenly over `args.seconds`; how often what was killed."""
    victims = [draws.choice(KILLED) for _ in range(args.kills)] + ["broker"] * args.broker_restarts
    draws.shuffle(victims)
    for victim in victims:
        time.sleep(args.seconds / len(victims) * draws.uniform(0.5, 1.5))
        stack.end(victim, number=SIGKILL)
        stack.start(victim)
    return Counter(victims)


def check(stack: Stack, jobs: list[Submitted]) -> dict[str, Any]:
    """Tell what became of the jobs."""
    tuning = [job.id for job in jobs if job.kind == "tuning-jobs"]
    samples = [job.id for job in jobs if job.kind == "samples"]
    with stack.registry.read() as session:
        rows = [*session.scalars(select(TuningJob)), *session.scalars(select(SampleJob).filter_by(parent_id=None))]
        schedules = Counter(session.scalars(select(Schedule.job_id)))
        versions = session.execute(select(func.count(), func.count(Schedule.version.distinct()))).one()
    states = {row.id: row.state for row in rows}
    accept = {"Accept": "application/x-npy"}
    images = [stack.client.get(f"/v1/samples/{job_id}/content", headers=accept) for job_id in samples]
    return {
        "accepted": len(jobs),
        "made of them": len(rows),
        "lost": sum(job.id not in states for job in jobs),
        "made twice": len(rows) - len(jobs),
        "not over": sum(state not in FINAL_STATES for state in states.values()),
        "failed": [f"{row.id}: {row.error}" for row in rows if row.state in ("failed", "cancelled")],
        "tuning jobs without a schedule": sum(schedules[job_id] == 0 for job_id in tuning),
        "schedules twice": sum(count > 1 for count in schedules.values()) + versions[0] - versions[1],
        "samples without images": sum(answer.status_code != 200 for answer in images),
        "attempts": sum(row.attempt for row in rows),
    }


def run(engine: str, args: argparse.Namespace) -> bool:
    draws = random.Random(args.seed)
    with deployment(engine, "worker 2", "worker 3") as stack:
        model = stack.register("mixture-gratings")
        began = time.monotonic()

        def at_its_time(number: int) -> Submitted:
            time.sleep(max(0.0, began + number * args.seconds / args.jobs - time.monotonic()))
            return submit(stack, model, number)

        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            killer = pool.submit(kill_at_random, stack, draws, args)
            jobs = list(pool.map(at_its_time, range(args.jobs)))
            killed = killer.result()
        ended = time.monotonic()
        wait_until(stack.is_ready, "readiness")
        with suppress(AssertionError):  # the result says it better
            wait_until(lambda: is_over(stack), "end of all jobs", RECOVERY_SECONDS)
        seconds = time.monotonic() - ended
        result = check(stack, jobs)
    print(f"\n**{engine}**, seed {args.seed}: killed {dict(killed)}; {seconds:.0f} s after the last all was over\n")
    for name, value in result.items():
        print(f"| {name} | {value} |")
    wrong = ("lost", "made twice", "not over", "failed", "tuning jobs without a schedule", "schedules twice")
    return not any(result[name] for name in (*wrong, "samples without images"))


def is_over(stack: Stack) -> bool:
    with stack.registry.read() as session:
        return not any(
            session.scalar(select(func.count()).where(table.state.not_in(FINAL_STATES)))
            for table in (TuningJob, SampleJob)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--broker-restarts", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300.0, help="over which jobs come and processes go")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(sum(not run(engine, args) for engine in args.database))


if __name__ == "__main__":
    main()
