"""Serving, over loopback, against what it could be: every table's ratios are of one run on one machine.

    python benchmarks/serving.py throughput     # 32 clients against a bare loop in one process, and without batching
    python benchmarks/serving.py overhead       # one client: what service, queue and worker add to the model's time
    python benchmarks/serving.py overload       # 5 times what it can do, for a minute, and the time after
    python benchmarks/serving.py rivals --rivals-python /tmp/rivals/bin/python     # LitServe and Ray Serve
    python benchmarks/serving.py rivals --num-steps 5 10 20 --rivals litserve litserve-endpoints --workers 2 ...
    python benchmarks/serving.py sizing         # docs/serving.md's queueing model against measured loads
    python benchmarks/serving.py all

digits8 or another `--model`, 10 steps of DDIM, one image to a request, each with another seed; `uncond`: unguided,
`cfg`: classifier-free by 2, with class labels. Our service is its real processes; the settings of its environment
(SAMPLE_BATCH_SIZE, MAX_QUEUE_SECONDS, DEVICE, DTYPE, ...) hold here too. The rivals always serve digits8.
`--seconds 5 --rounds 1` is a short look.

What is compared takes turns, `--rounds` times, so that a machine that is now faster and now slower favours nobody. Each
process's arithmetic has `--threads` threads. Clients run in this process, which otherwise sleeps.

The rivals have an environment of their own, which sees this one's packages behind its own:

    uv venv --python .venv/bin/python /tmp/rivals
    uv pip install --python /tmp/rivals/bin/python litserve "ray[serve]"
    realpath .venv/lib/python3.11/site-packages > /tmp/rivals/lib/python3.11/site-packages/timetuner.pth

They, too, run on loopback only, with one replica, and are started anew for each measurement.
"""

import argparse
import asyncio
import itertools
import signal
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from serving_load import Answer, Load, Overload, Target, closed_loop, one_by_one, open_loop, overload
from serving_processes import NUM_STEPS, Processes, Service, bare, rival, serve

CLIENTS = 32
WARM_UP_SECONDS = 3.0
BARE_BATCH_SIZES = (8, 16, 24, 32, 48)
BLOCK = 20  # requests, then as many calls of the model alone
OVERLOAD = 5
RIVALS = ("litserve", "litserve-endpoints", "ray")  # The second has an endpoint for each number of steps.
RIVAL_BATCH_SIZES, RIVAL_WAITS = (16, 32), (0.002, 0.01)
NORMAL = 2.0  # times the median latency before: what counts as back to normal


@dataclass
class Measured:
    """One entrant's loads, over the rounds."""

    loads: list[Load] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)

    def measure_service(self, service: Service, guidance: str, seconds: float) -> None:
        """Ours, and what its worker does meanwhile."""
        before = service.phase_seconds()
        self.measure(service.target(guidance), seconds)
        for phase, after in service.phase_seconds().items():
            self.phases[phase] = self.phases.get(phase, 0.0) + after - before[phase]

    def measure(self, target: Target, seconds: float) -> None:
        self.loads.append(asyncio.run(closed_loop(target, CLIENTS, seconds, WARM_UP_SECONDS)))

    @property
    def rate(self) -> float:
        return statistics.mean(load.rate for load in self.loads)

    def cells(self) -> str:
        """p50, p99, not accepted, and the client's own cost."""
        latencies = [latency for load in self.loads for latency in load.latencies]
        others, answers = sum(load.others for load in self.loads), sum(len(load.answers) for load in self.loads)
        cost = 1000 * sum(load.cpu_seconds for load in self.loads) / max(1, answers)
        return f"{percentiles(latencies)} | {others} | {cost:.2f}"


def ratio(one: float, other: float) -> float:
    return one / other if other else float("nan")


def percentiles(milliseconds: Iterable[float]) -> str:
    values = list(milliseconds)
    return " | ".join(f"{np.percentile(values, q):.1f}" for q in (50, 99)) if values else "- | -"


def head(*names: str) -> None:
    """The first lines of a Markdown table: words, then numbers."""
    print(f"| {' | '.join(names)} |")
    print(f"| --- |{' ---: |' * (len(names) - 1)}", flush=True)


def throughput(args: argparse.Namespace) -> None:
    for guidance in args.guidance or ("uncond", "cfg"):
        print(f"\n**throughput**, {guidance}, {CLIENTS} clients, {args.threads} thread(s)\n")
        rates: list[float] = []
        batched, unbatched = Measured(), Measured()
        with bare(guidance, args.threads, args.model) as loop:
            for size in BARE_BATCH_SIZES:
                loop.ask("rate", size, 0.5)
            sizes = loop.ask("worker_sizes")
            sweep = {size: loop.ask("rate", size, args.seconds / 4) for size in BARE_BATCH_SIZES}
            best = max(sweep, key=lambda size: sweep[size])
            for _ in range(args.rounds):
                rates.append(loop.ask("rate", best, args.seconds))
                for measured, variables in ((batched, {}), (unbatched, {"SAMPLE_BATCH_SIZE": "1"})):
                    with serve(args.threads, args.database, args.model, **variables) as service:
                        measured.measure_service(service, guidance, args.seconds)
        bare_rate = statistics.mean(rates)
        print("bare loop, images/s by batch size:", ", ".join(f"{size}: {rate:.0f}" for size, rate in sweep.items()))
        print("batch sizes of the service:", _ranges(sizes))
        for name, measured in (("the worker", batched), ("the worker, SAMPLE_BATCH_SIZE=1", unbatched)):
            phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in measured.phases.items())
            print(f"{name}, seconds by phase, warm-up included: {phases}")
        print()
        head("", "images/s", "of bare", "p50, ms", "p99, ms", "not 200", "client's ms per request")
        print(f"| bare loop, batches of {best} | {bare_rate:.1f} | 1 | | | | |")
        for name, measured in (("service", batched), ("service, SAMPLE_BATCH_SIZE=1", unbatched)):
            print(f"| {name} | {measured.rate:.1f} | {ratio(measured.rate, bare_rate):.2f} | {measured.cells()} |")
        print(f"\nbatching on over off: {ratio(batched.rate, unbatched.rate):.2f}", flush=True)


def overhead(args: argparse.Namespace) -> None:
    for guidance in args.guidance or ("uncond",):
        print(f"\n**overhead**, {guidance}, one client, {args.requests} requests, {args.threads} thread(s)\n")
        latencies, padded, plain, steps, added, beside = [], [], [], [], [], []
        with (
            bare(guidance, args.threads, args.model) as loop,
            serve(args.threads, args.database, args.model) as service,
        ):
            sizes = loop.ask("worker_sizes")
            loop.ask("times", BLOCK, sizes)
            target = service.target(guidance)
            asyncio.run(one_by_one(target, BLOCK))
            for _ in range(args.requests // BLOCK):
                at_steps = [service.step_seconds()]
                load = asyncio.run(one_by_one(target, BLOCK, lambda seen=at_steps: seen.append(service.step_seconds())))
                own = loop.ask("times", BLOCK, sizes)
                plain += loop.ask("times", BLOCK, None)
                latencies += load.latencies
                padded += own
                added += [latency - statistics.median(own) for latency in load.latencies]
                steps += (during := [1000 * (after - before) for before, after in itertools.pairwise(at_steps)])
                beside += [latency - at for latency, at in zip(load.latencies, during, strict=True)]
        head("", "median, ms", "p99, ms")
        print(f"| latency | {percentiles(latencies)} |")
        print(f"| the model's own, as the worker calls it (batch sizes {_ranges(sizes)}) | {percentiles(padded)} |")
        print(f"| the model's own, one image alone | {percentiles(plain)} |")
        print(f"| the worker's steps | {percentiles(steps)} |")
        print(f"| latency less the worker's steps of that request | {percentiles(beside)} |")
        print(f"| latency less the model's median in the same block | {percentiles(added)} |", flush=True)


SIZING_CLIENTS = (1, 4, 16, 32)
MOST_IN_FLIGHT = 1000  # The model knows no longer queue.
SIZING_SHARES = (0.3, 0.6, 0.8)  # Shares of the rate that the model says the service can serve.


@dataclass(frozen=True)
class Sizing:
    """The queueing model of docs/serving.md: rows share the network's steps, and how many there are fluctuates.

    Attributes:
        step_ms: of one step of a network batch, by batch size. added_ms: by service, queue and worker, per request.
        slower: how many times as long steps take in the service, by its rate when it is saturated.
        num_steps: of each request, of one image.
    """

    step_ms: dict[int, float]
    added_ms: float
    slower: float = 1.0
    num_steps: int = 10

    @property
    def capacity(self) -> float:
        """Images per second with a full batch."""
        return self.ends_per_second(max(self.step_ms))

    def step(self, rows: int) -> float:
        """The milliseconds of a step of so many rows, between the sizes that were measured."""
        sizes = sorted(self.step_ms)
        return self.slower * float(np.interp(rows, sizes, [self.step_ms[size] for size in sizes]))

    def ends_per_second(self, rows: int) -> float:
        """How many rows are done in a second while so many are in flight. Those beyond a full batch wait."""
        rows = min(rows, max(self.step_ms))
        return 1000 * rows / (self.num_steps * self.step(rows))

    def clients(self, count: int) -> tuple[float, float]:
        """Images per second and latency, ms, of so many clients, each asking as soon as it was answered.

        They form a closed network: of those that are not in flight, each comes back after what is added to a request.
        """
        weights = [1.0]
        for rows in range(1, count + 1):
            coming = (count - rows + 1) * 1000 / self._outside(rows)
            weights.append(weights[-1] * coming / self.ends_per_second(rows))
        ends = sum(weight * self.ends_per_second(rows) for rows, weight in enumerate(weights) if rows)
        rate = ends / sum(weights)
        return rate, 1000 * count / rate

    def arrivals(self, rate: float) -> tuple[float, float]:
        """The same of requests that arrive at random at a rate below the capacity. Little's law gives their time."""
        weights = [1.0]
        while len(weights) < MOST_IN_FLIGHT:
            weights.append(weights[-1] * rate / self.ends_per_second(len(weights)))
        shares = [weight / sum(weights) for weight in weights]
        in_flight = sum(rows * share for rows, share in enumerate(shares))
        outside = sum(share * self._outside(max(rows, 1)) for rows, share in enumerate(shares))
        return rate, 1000 * in_flight / rate + outside

    def _outside(self, rows: int) -> float:
        """The milliseconds that a request spends outside the batch: what is added, and half a step until it joins."""
        return self.added_ms + self.step(min(rows, max(self.step_ms))) / 2


def _ranges(sizes: list[int]) -> str:
    """Rising numbers, with those that follow one another as a range."""
    ranges: list[list[int]] = []
    for size in sizes:
        if ranges and size == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], size]
        else:
            ranges.append([size])
    return ", ".join(" to ".join(map(str, each)) for each in ranges)


def sizing(args: argparse.Namespace) -> None:
    for guidance in args.guidance or ("uncond",):
        print(f"\n**sizing**, {guidance}, {args.threads} thread(s)\n")
        with (
            bare(guidance, args.threads, args.model) as loop,
            serve(args.threads, args.database, args.model) as service,
        ):
            most = loop.ask("worker_sizes")[-1]
            sizes = (*(size for size in BARE_BATCH_SIZES if size < most), most)
            step_ms = {size: 1000 * size / loop.ask("rate", size, args.seconds / 8) / 10 for size in (1, 2, 4, *sizes)}
            target = service.target(guidance)  # one for all, as each of its requests has another seed
            asyncio.run(one_by_one(target, BLOCK))
            single = asyncio.run(one_by_one(target, 5 * BLOCK))
            added_ms = statistics.median(single.latencies) - 10 * step_ms[1]
            saturated = asyncio.run(closed_loop(target, 2 * most, args.seconds, WARM_UP_SECONDS))
            model = Sizing(step_ms, added_ms, Sizing(step_ms, added_ms).capacity / saturated.rate)
            print("ms per step:", ", ".join(f"{size} rows: {ms:.1f}" for size, ms in step_ms.items()), end="; ")
            print(f"added: {added_ms:.1f} ms; saturated: {saturated.rate:.0f} images/s, {model.slower:.2f} x as long\n")
            latency = "mean latency, ms, model"
            head("load", "images/s, model", "measured", latency, "measured", "ms per step, model", "measured")
            for count in SIZING_CLIENTS:
                before = service.step_seconds(), service.num_steps()
                load = asyncio.run(closed_loop(target, count, args.seconds / 2, WARM_UP_SECONDS))
                step = mean_step(service, before)
                print(sizing_row(f"{count} clients", model, model.clients(count), load, step), flush=True)
            for share in SIZING_SHARES:
                rate = share * model.capacity
                before = service.step_seconds(), service.num_steps()
                load = asyncio.run(open_loop(target, rate, args.seconds, WARM_UP_SECONDS))
                name, step = f"{rate:.0f} arrivals/s, {share} of it", mean_step(service, before)
                print(sizing_row(name, model, model.arrivals(rate), load, step), flush=True)


def mean_step(service: Service, before: tuple[float, float]) -> float:
    """The milliseconds of a step since then, as the worker tells them."""
    return 1000 * (service.step_seconds() - before[0]) / max(1.0, service.num_steps() - before[1])


def sizing_row(name: str, model: Sizing, expected: tuple[float, float], load: Load, step_ms: float) -> str:
    mean = statistics.mean(load.latencies) if load.latencies else float("nan")
    # By Little's law, so many rows were in the batch of a step in the mean.
    rows = load.rate * model.num_steps * step_ms / 1000
    cells = f"{expected[0]:.1f} | {load.rate:.1f} | {expected[1]:.0f} | {mean:.0f}"
    return f"| {name} | {cells} | {model.step(max(1, round(rows))):.1f} | {step_ms:.1f} |"


def rivals(args: argparse.Namespace) -> None:
    for guidance in args.guidance or ("uncond",):
        steps = ", ".join(map(str, args.num_steps))
        print(f"\n**rivals**, {guidance}, {steps} steps, {CLIENTS} clients, {args.threads} thread(s)\n")
        entrants = {"ours": Measured()}
        settings = {name: best_settings(args, name, guidance) for name in args.rivals}
        entrants |= {name: Measured() for name in args.rivals}
        for _ in range(args.rounds):
            with serve(args.threads, args.database, args.model, num_workers=args.workers) as service:
                entrants["ours"].measure(service.target(guidance, args.num_steps), args.seconds)
            for name in args.rivals:
                options = (*settings[name], args.num_steps)
                with rival(name, args.rivals_python, guidance, args.threads, *options) as target:
                    entrants[name].measure(target, args.seconds)
        print()
        head("", "images/s", "of ours", "p50, ms", "p99, ms", "not 200", "client's ms per request")
        for name, measured in entrants.items():
            label = name if name == "ours" else "{}, batches of {}, wait {} s".format(name, *settings[name])
            of_ours = ratio(measured.rate, entrants["ours"].rate)
            print(f"| {label} | {measured.rate:.1f} | {of_ours:.2f} | {measured.cells()} |", flush=True)


def best_settings(args: argparse.Namespace, name: str, guidance: str) -> tuple[int, float]:
    """The batch size and wait of the most images per second, in a shorter measurement of each."""
    rates = {}
    for settings in itertools.product(RIVAL_BATCH_SIZES, RIVAL_WAITS):
        with rival(name, args.rivals_python, guidance, args.threads, *settings, args.num_steps) as target:
            measured = Measured()
            measured.measure(target, args.seconds / 2)
        rates[settings] = measured.rate
    print(f"{name}, images/s:", ", ".join(f"{size}, {wait} s: {rate:.0f}" for (size, wait), rate in rates.items()))
    return max(rates, key=lambda settings: rates[settings])


def overloaded(args: argparse.Namespace) -> None:
    seconds = args.overload_seconds
    for guidance in args.guidance or ("uncond",):
        print(f"\n**overload**, {guidance}, {OVERLOAD} x saturation for {seconds:g} s, {args.threads} thread(s)\n")
        with serve(args.threads, args.database, args.model) as service:
            target = service.target(guidance)
            saturated = asyncio.run(closed_loop(target, CLIENTS, args.seconds, WARM_UP_SECONDS))
            time.sleep(1)
            before = asyncio.run(one_by_one(target, BLOCK))
            rate = OVERLOAD * saturated.rate
            result, memory = asyncio.run(watched(overload(target, rate, seconds), service.processes))
        head("", "sent/s", "accepted/s", "p50, ms", "p99, ms", "429", "other")
        print(load_row(f"saturated, {CLIENTS} clients", saturated))
        print(load_row(f"overloaded, asked for {rate:.0f}/s", result.load))
        slower = ratio(percentile(result.load.latencies, 99), percentile(saturated.latencies, 99))
        print(f"\np99 of accepted, over that at saturation: {slower:.2f}")
        print_rejections(result)
        print_recovery(result, percentile(before.latencies, 50))
        print_memory(memory, result.ends, seconds)


async def watched(
    running: Any, processes: Processes, every: float = 0.5
) -> tuple[Overload, list[tuple[float, dict[str, float]]]]:
    """The result of the coroutine, and the memory of the processes meanwhile."""
    memory = []
    task = asyncio.ensure_future(running)
    while not task.done():
        memory.append((time.monotonic(), processes.megabytes()))
        await asyncio.wait([task], timeout=every)
    return task.result(), memory


def percentile(values: list[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else float("nan")


def load_row(name: str, load: Load) -> str:
    sent = len(load.answers)
    rejected = sum(answer.status == 429 for answer in load.answers)
    cells = f"{rejected / sent:.1%} | {(load.others - rejected) / sent:.1%}"
    return f"| {name} | {sent / load.seconds:.1f} | {load.rate:.1f} | {percentiles(load.latencies)} | {cells} |"


def print_rejections(result: Overload) -> None:
    """How the rejected were told to return, and what came of it; how late the sender was."""
    answers = result.load.answers
    rejected = [answer for answer in answers if answer.status == 429]
    told = [answer.retry_after for answer in rejected if answer.retry_after is not None]
    if told:
        print(f"Retry-After: {min(told):g} to {max(told):g} s, median {statistics.median(told):g} s", end="; ")
    print(f"{len(rejected) - len(told)} of {len(rejected)} without; p99 {percentiles(milliseconds(rejected))} ms")
    print(f"sent again after it, during the load: {accepted(result.retries)}", end="; ")
    print(f"the last ones, after the load: {accepted(result.retries_after_load)}")
    statuses = sorted({answer.status for answer in answers})
    print("answers by status:", {status: sum(a.status == status for a in answers) for status in statuses})
    late = percentile([1000 * answer.late for answer in answers], 99)
    cost = 1000 * result.load.cpu_seconds / len(answers)
    print(f"the sender was late by {late:.1f} ms (p99), and needed {cost:.2f} ms of processor per request")


def milliseconds(answers: list[Answer]) -> list[float]:
    return [1000 * answer.seconds for answer in answers]


def accepted(answers: list[Answer]) -> str:
    return f"{sum(answer.is_accepted for answer in answers)} of {len(answers)} accepted"


def print_recovery(result: Overload, median: float) -> None:
    """When single requests were as fast again as before."""
    normal = [
        answer.due - result.ends
        for answer in result.probes
        if answer.is_accepted and 1000 * answer.seconds < NORMAL * median
    ]
    after = f"{min(normal):.1f} s after the load's end" if normal else "not seen"
    print(f"single requests: median before {median:.1f} ms; below {NORMAL:g} x that again: {after}")
    shown = (f"{1000 * a.seconds:.0f}" if a.is_accepted else f"({a.status})" for a in result.probes)
    print("single requests after the load, ms:", " ".join(shown), flush=True)


def print_memory(memory: list[tuple[float, dict[str, float]]], ends: float, seconds: float) -> None:
    """Resident memory of each process, through the load and at the end."""
    moments = [ends - seconds, *(ends - seconds * (1 - part) for part in (0.25, 0.5, 0.75, 1.0)), memory[-1][0]]
    names = [f"{moment - ends + seconds:.0f} s" for moment in moments]
    print()
    head("resident memory, MB", *names)
    for process in memory[0][1]:
        values = [min(memory, key=lambda entry: abs(entry[0] - moment))[1][process] for moment in moments]
        print(f"| {process} | {' | '.join(f'{value:.0f}' for value in values)} |", flush=True)


def stop(*_: object) -> None:
    """Leave through all that stops what was started."""
    raise SystemExit(1)


SCENARIOS = {"throughput": throughput, "overhead": overhead, "overload": overloaded, "sizing": sizing, "rivals": rivals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=(*SCENARIOS, "all"))
    parser.add_argument(
        "--guidance", nargs="+", choices=("uncond", "cfg"), help="default: throughput both, else uncond"
    )
    parser.add_argument("--model", default="digits8", help="a built-in one, or a diffusers-format folder with classes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement under load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=300, help="of overhead")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=["litserve", "ray"])
    parser.add_argument("--num-steps", nargs="+", type=int, default=[NUM_STEPS], help="of rivals' requests, in turn")
    parser.add_argument("--workers", type=int, default=1, help="of our service, beside rivals")
    parser.add_argument("--rivals-python", help="the Python of their environment")
    args = parser.parse_args()
    if args.scenario == "rivals" and not args.rivals_python:
        parser.error("rivals needs --rivals-python; how to make their environment is at the top of this file")
    signal.signal(signal.SIGTERM, stop)
    chosen = SCENARIOS if args.scenario == "all" else {args.scenario: SCENARIOS[args.scenario]}
    for name, scenario in chosen.items():
        if name == "rivals" and not args.rivals_python:
            print("\nrivals: left out, as there is no --rivals-python")
        else:
            scenario(args)


if __name__ == "__main__":
    main()
