"""The cost of idle streams: an API's share of a core, and the time of a small GET, with and without 200 of them.

    python benchmarks/idle_streams.py [--streams 200] [--seconds 10] [--turns 3]

Each stream follows another tuning job, to which nothing happens. Both cases are measured in turns.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import httpx
import psutil
from serving_processes import Processes, free_port

from service.registry.database import Registry
from service.registry.jobs import add_event
from service.registry.tables import JobState, Model, TuningJob
from service.up.supervisor import valkey_command

SETTLING_SECONDS = 6.0
PAUSE_SECONDS = 0.05  # The pause between two of the measured requests.
SMALL_GET = "/v1/tuning-jobs?limit=1"


def add_jobs(registry: Registry, count: int) -> list[str]:
    """Tuning jobs that a worker seems to be at work on. There is neither worker nor dispatcher to see that none is."""
    with registry.write() as session:
        model = Model(name="ring", content_hash="0", source={"builtin": "mixture-ring"}, spec={})
        session.add(model)
        session.flush()
        jobs = [TuningJob(model_id=model.id, request={}, state=JobState.RUNNING) for _ in range(count)]
        session.add_all(jobs)
        session.flush()
        for job in jobs:
            add_event(session, job, "queued")
        return [job.id for job in jobs]


async def follow(client: httpx.AsyncClient, job_id: str) -> None:
    headers = {"Accept": "text/event-stream"}
    async with client.stream("GET", f"/v1/tuning-jobs/{job_id}/events", headers=headers, timeout=None) as response:
        async for _ in response.aiter_bytes():
            pass


async def measure(url: str, api: psutil.Process, job_ids: list[str], seconds: float) -> tuple[float, list[float]]:
    """The API's share of a core in percent, and the times of small GETs in milliseconds, while jobs are followed."""
    limits = httpx.Limits(max_connections=None)
    # The small requests have a client of their own: one with 200 connections goes through them for each request.
    async with httpx.AsyncClient(base_url=url, limits=limits) as client, httpx.AsyncClient(base_url=url) as other:
        following = [asyncio.create_task(follow(client, job_id)) for job_id in job_ids]
        await asyncio.sleep(SETTLING_SECONDS)
        times = []
        before, began = sum(api.cpu_times()[:2]), time.monotonic()
        await asyncio.sleep(seconds)
        share = 100 * (sum(api.cpu_times()[:2]) - before) / (time.monotonic() - began)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            sent = time.perf_counter()
            (await other.get(SMALL_GET)).raise_for_status()
            times.append(1000 * (time.perf_counter() - sent))
            await asyncio.sleep(PAUSE_SECONDS)
        if any(task.done() for task in following):
            raise RuntimeError("a stream ended")
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
    return share, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="timetuner-bench-") as folder:
        home = Path(folder)
        registry = Registry(f"sqlite:///{home / 'registry.sqlite'}")
        registry.upgrade()
        job_ids = add_jobs(registry, options.streams)
        command, broker_socket = valkey_command(home)
        port = free_port()
        environment = dict(os.environ, TIMETUNER_HOME=folder, BROKER_URL=f"redis+socket://{broker_socket}", AUTH="off")
        with Processes(environment) as processes:
            processes.start("broker", *command)
            processes.wait_until(broker_socket.exists)
            api = processes.start("api", sys.executable, "-m", "service", "api", "--port", str(port))
            url = f"http://127.0.0.1:{port}"
            processes.wait_until(lambda: _answers(url))
            figures: dict[int, list[tuple[float, list[float]]]] = {0: [], options.streams: []}
            for _ in range(options.turns):
                for count, found in figures.items():
                    found.append(asyncio.run(measure(url, psutil.Process(api.pid), job_ids[:count], options.seconds)))
        registry.close()
    for count, found in figures.items():
        times = [each for _, of_turn in found for each in of_turn]
        shares = ", ".join(f"{share:.1f}" for share, _ in found)
        print(f"{count:4} streams: {shares} % of a core; GET {SMALL_GET} {median(times):.1f} ms", end="")
        print(f" (95 %: {quantiles(times, n=20)[-1]:.1f} ms)")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
