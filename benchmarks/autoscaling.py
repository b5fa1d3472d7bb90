"""Sampling workers that start and stop under load, by the age of the oldest waiting job: no request may be lost.

    python benchmarks/autoscaling.py [--clients 200] [--most 2]

The service is ours, with `digits8` and batches of `--batch-size`. A loop does what `examples/kubernetes/keda.yaml` asks
an autoscaler for: a worker starts where the oldest job has waited for over 2 s, unless one is starting, and one ends
(SIGTERM) where nothing has waited for `CALM_SECONDS`. Load: few clients, many, few. Each asks again at once.
"""

import argparse
import asyncio
import itertools
import os
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field

from serving_load import Load, closed_loop
from serving_processes import PYTHON, Service, free_port, metric, serve

MAX_AGE_SECONDS = 2.0
CALM_SECONDS = 5.0
STARTING_SECONDS = 12.0  # A worker that was started helps only then.
FEW = 2
PHASES = (("few clients", 8.0), ("many", 45.0), ("few again", 25.0))


@dataclass
class Scaler:
    """Starts and stops workers beside the first one, until it is told to end."""

    service: Service
    most: int
    names: list[str] = field(default_factory=list)
    history: list[tuple[float, int, float]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Look once a second. `history` gets the time, the number of workers and the age that was seen."""
        last_start = calm_since = time.monotonic()
        while not self.ended.wait(1.0):
            now, age = time.monotonic(), self._age()
            if age > 0:
                calm_since = now
            if age > MAX_AGE_SECONDS and 1 + len(self.names) < self.most and now - last_start > STARTING_SECONDS:
                name = f"worker {len(self.history)}"
                command = ("env", f"METRICS_PORT={free_port()}", PYTHON, "-m", "worker")
                self.service.processes.start(name, *command)
                self.names.append(name)
                last_start = now
            elif self.names and now - calm_since > CALM_SECONDS:
                self.service.processes.running[self.names.pop()].send_signal(signal.SIGTERM)
                calm_since = now
            self.history.append((now, 1 + len(self.names), age))

    def _age(self) -> float:
        url = f"http://127.0.0.1:{self.service.port}/metrics"
        ages = metric(url, "timetuner_queue_age_seconds")
        return next(value for labels, value in ages if labels["kind"] == "sampling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--most", type=int, default=2, help="workers at most")
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    variables = {"SAMPLE_BATCH_SIZE": str(args.batch_size), "MAX_QUEUE_SECONDS": "600", "MAX_QUEUED_JOBS": "10000"}
    with serve(1, **variables) as service:
        scaler = Scaler(service, args.most)
        thread = threading.Thread(target=scaler.run)
        thread.start()
        target = service.target("uncond")  # No seed comes twice, as the image would be found.
        print("| | workers | oldest waited, s | images/s | p50, ms | p99, ms | not 200 |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, seconds in PHASES:
            began = time.monotonic()
            clients = args.clients if name == "many" else FEW
            load = asyncio.run(closed_loop(target, clients, seconds, 0.0))
            _print(name, load, [look for look in scaler.history if look[0] >= began])
        scaler.ended.set()
        thread.join()
    print(f"\n{os.cpu_count()} cores; one thread of arithmetic for each worker")


def _print(name: str, load: Load, looks: list[tuple[float, int, float]]) -> None:
    workers = [number for _, number, _ in looks]
    changes = [workers[0], *(b for a, b in itertools.pairwise(workers) if a != b)]
    p99 = statistics.quantiles(load.latencies, n=100)[-1]
    cells = [" → ".join(map(str, changes)), f"{max(age for *_, age in looks):.1f}", f"{load.rate:.1f}"]
    cells += [f"{statistics.median(load.latencies):.0f}", f"{p99:.0f}", str(load.others)]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
