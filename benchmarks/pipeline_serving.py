"""A whole pipeline served to 16 clients: our service beside LitServe, Ray Serve and BentoML, in turns, in one run.

    python benchmarks/pipeline_serving.py --rivals-python /tmp/rivals/bin/python

The pipeline is the tests' Stable Diffusion 1.5, or one of as many `--channels`, guided by 7.5, with its own scheduler.
`mixed`: 4, 8, 20 steps in turn; `equal`: 8 steps. Each entrant has its own way of batching: see `pipeline_rivals.py`;
the best batch size and wait are looked for before. The rivals' environment is made as `serving.py` says, with
`bentoml` besides.
"""

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from serving import Measured, head, ratio
from serving_load import Target, closed_loop
from serving_processes import HERE, Processes, environment, free_port, is_answered, serve
from small_pipelines import kind, small_stable_diffusion

CLIENTS = 16
WARM_UP_SECONDS = 3.0
STEPS = {"mixed": (4, 8, 20), "equal": (8,)}
SETTINGS = ((16, 0.01), (16, 0.1))
START_SECONDS = 120.0
PROMPT = "a red square on table $number"  # No two requests have the same.


@contextmanager
def rival(name: str, python: str, folder: Path, threads: int, settings: tuple[int, float], body: str) -> Iterator[str]:
    """A rival's address, once it answers."""
    batch_size, wait = settings
    with tempfile.TemporaryDirectory(prefix="rival-") as home:
        variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TMPDIR": home}
        variables |= {"BENTOML_DO_NOT_TRACK": "true", "BENTOML_HOME": home}
        variables |= {"HOME": home, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
        with Processes(environment(threads, **variables)) as processes, httpx.Client(trust_env=False) as client:
            port = free_port()
            command = (python, str(HERE / "pipeline_rivals.py"), name, str(folder), str(port), str(batch_size))
            processes.start(name, *command, str(wait), stdout=subprocess.DEVNULL)
            url = f"http://127.0.0.1:{port}/predict"
            example = json.loads(body.replace('"$seed"', "0").replace('"$choice"', "4"))
            processes.wait_until(lambda: is_answered(client, "POST", url, json=example, timeout=60))
            yield url


def rival_body(name: str) -> str:
    request = {"prompt": PROMPT, "num_steps": "$choice", "seed": "$seed"}
    return json.dumps({"requests": [request]} if name == "bentoml" else request)


def measure(measured: Measured, target: Target, seconds: float) -> None:
    measured.loads.append(asyncio.run(closed_loop(target, CLIENTS, seconds, WARM_UP_SECONDS)))


def best_settings(args: argparse.Namespace, name: str, folder: Path, steps: tuple[int, ...]) -> tuple[int, float]:
    rates = {}
    for settings in SETTINGS:
        with rival(name, args.rivals_python, folder, args.threads, settings, rival_body(name)) as url:
            measured = Measured()
            measure(measured, target_of(url, rival_body(name), steps), args.seconds / 3)
            rates[settings] = measured.rate
    print(f"{name}, images/s by batch size and wait:", ", ".join(f"{s}: {rate:.2f}" for s, rate in rates.items()))
    return max(rates, key=lambda settings: rates[settings])


def target_of(url: str, body: str, steps: tuple[int, ...]) -> Target:
    parts = httpx.URL(url)
    assert parts.port is not None
    return Target(parts.port, parts.path, body, choices=steps)


def compare(args: argparse.Namespace, load: str, folder: Path) -> None:
    steps = STEPS[load]
    entrants = {"service": Measured(), **{name: Measured() for name in args.rivals}}
    settings = {name: best_settings(args, name, folder, steps) for name in args.rivals}
    for _ in range(args.rounds):
        variables = {"MODELS_DIR": str(folder.parent), "MAX_PIXEL_STEPS": str(2**40), "MAX_QUEUE_SECONDS": "600"}
        with serve(args.threads, pipeline=folder.name, **variables) as service:
            request = {"model": service.model, "prompt": PROMPT, "num_steps": "$choice", "seed": "$seed"}
            url = f"http://127.0.0.1:{service.port}/v1/samples"
            measure(
                entrants["service"], target_of(url, json.dumps(request | {"schedule": "none"}), steps), args.seconds
            )
        for name in args.rivals:
            with rival(name, args.rivals_python, folder, args.threads, settings[name], rival_body(name)) as url:
                measure(entrants[name], target_of(url, rival_body(name), steps), args.seconds)
    print(f"\n**{load}**, {CLIENTS} clients, {args.rounds} rounds of {args.seconds:g} s, {args.threads} thread(s)\n")
    head("", "images/s", "of ours", "p50, ms", "p99, ms", "not 200", "client's ms per request")
    for name, measured in entrants.items():
        share = ratio(measured.rate, entrants["service"].rate)
        print(f"| {name} {settings.get(name, '')} | {measured.rate:.2f} | {share:.2f} | {measured.cells()} |")
    best = max(measured.rate for name, measured in entrants.items() if name != "service")
    print(f"\nours over the best rival: {ratio(entrants['service'].rate, best):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals-python", required=True, help="the Python of their environment")
    parser.add_argument("--rivals", nargs="+", default=["litserve", "ray", "bentoml"])
    parser.add_argument("--load", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--channels", type=int, default=0, help="of the U-Net; 0: the pipeline of the tests")
    parser.add_argument(
        "--levels", type=int, choices=(2, 4), default=2, help="of that U-Net; 4: the layers of SD 1.5's"
    )
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipelines-") as home:
        folder = Path(home, "sd15")
        if args.channels:
            pipeline = small_stable_diffusion(args.channels, args.size, norm_num_groups=4, levels=args.levels)
        else:
            pipeline = kind("sd15")
        pipeline.save_pretrained(folder)
        for load in args.load:
            compare(args, load, folder)


if __name__ == "__main__":
    main()
