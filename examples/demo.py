"""The main job, end to end, as an HTTP client of a service started for the occasion: `make demo`.

Starts `timetuner up`, registers the bundled model of clothes and tunes it for 4 and 6 network calls. Then samples the
teacher, every untuned sampler and the tuned schedules from the same noise, prints how near each comes to the teacher,
and writes `demo.png`. Everything it started is stopped at the end, however it ends.
"""

import argparse
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from timetuner_core.catalog import SAMPLER_FACTS

Json = dict[str, Any]
MODEL = "fashion32"
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
# The longer job first, so that two workers finish at about the same time.
NUM_CALLS = (6, 4)
SAMPLER = "dpmpp_2m"
GUIDANCE: Json = {"guidance_type": "classifier-free", "guidance_scale": 4.0}
TEACHER_NUM_STEPS = 50
# Less than the service's defaults, so that two cores need less than four minutes.
EFFORT: Json = {
    "tuner": {"objective": "solver", "total_iters": 6, "population_size": 64, "teacher_num_steps": TEACHER_NUM_STEPS},
    "evaluation": {"num_samples": 32, "max_num_samples": 32, "teacher_num_steps": TEACHER_NUM_STEPS},
}
NUM_IMAGES = 20  # No tuning has seen their noise, as seeds of jobs start at 2**31.
STOP_SECONDS = 60

# The picture's pixels and colours. A difference of a quarter of the range of grey, or more, has the last colour.
TILE, GAP, MARGIN = 72, 3, 16
ROW_HEIGHT = 2 * TILE + GAP + 10
INK, QUIET, TUNED, UNTUNED = "#1b2129", "#57616e", "#1f5fbf", "#c05621"
HEAT = ((255, 255, 255), (254, 217, 142), (236, 112, 20), (165, 15, 21), (70, 0, 10))
MOST_OFF = 0.5

console = Console(width=max(80, Console().width))  # the table needs 80 columns, whatever a log says it has


@dataclass(frozen=True)
class Way:
    """A way of sampling, its images `(NUM_IMAGES, 1, 32, 32)`, and their mean distance to the teacher's."""

    name: str
    num_calls: int
    images: np.ndarray
    distance: float


@dataclass(frozen=True)
class Comparison:
    """The best untuned sampler, the best with twice as many calls, and the tuned schedule."""

    untuned: Way
    doubled: Way
    tuned: Way


@contextmanager
def running_service(home: str) -> Iterator[httpx.Client]:
    """`timetuner up` on a free port, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service", "up", "--port", str(port), "--home", home]
    # Feature maps are too small to share among threads, which on a busy machine would wait for each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # A session of its own: a terminal's Ctrl-C reaches only us, and we stop it in order.
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if "ready" not in process.stdout.readline():
            raise SystemExit("the service did not start; its messages are above")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=150) as client:
            yield client
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # Child processes die with it.
            process.wait()


def call(client: httpx.Client, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """A request whose refusal is an error that says why."""
    try:
        response = client.request(method, path, **kwargs)
    except httpx.HTTPError as error:
        raise SystemExit(f"{method} {path}: {error!r}; the service's messages are above") from None
    if response.is_error:
        raise SystemExit(f"{method} {path}: {response.status_code} {response.text}")
    return response


def tune(client: httpx.Client, model: str) -> dict[int, Json]:
    """Submit a job for each number of calls, show their progress, and return their schedules by that number."""
    setting = {"model": model, "sampler": SAMPLER, **GUIDANCE, **EFFORT}
    jobs = [call(client, "POST", "/v1/tuning-jobs", json={**setting, "num_steps": n}).json() for n in NUM_CALLS]
    console.print(f"Tuning {len(jobs)} schedules, both at a time")
    columns = (TextColumn("{task.description:10}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = [progress.add_task(f"{num_calls} calls", total=1.0, start=False) for num_calls in NUM_CALLS]
        while not all(job["finished_at"] for job in jobs):
            time.sleep(0.5)
            jobs = [call(client, "GET", f"/v1/tuning-jobs/{job['id']}").json() for job in jobs]
            for bar, job in zip(bars, jobs, strict=True):
                if job["state"] != "queued":
                    progress.start_task(bar)
                    progress.update(bar, completed=job["progress"])
                if job["finished_at"] and not progress.tasks[bar].stop_time:
                    progress.stop_task(bar)
                    if not console.is_terminal:  # a log shows bars only once all is over
                        console.print(f"{progress.tasks[bar].description}: {job['state']}")
    if failed := [job for job in jobs if job["state"] != "succeeded"]:
        raise SystemExit(f"{failed[0]['id']} {failed[0]['state']}: {failed[0]['error']}")
    return {
        num_calls: call(client, "GET", f"/v1/schedules/{job['schedule']}").json()
        for num_calls, job in zip(NUM_CALLS, jobs, strict=True)
    }


def sample(client: httpx.Client, model: str, sampler: str, num_steps: int, schedule: str = "none") -> np.ndarray:
    """Images `(NUM_IMAGES, 1, 32, 32)` in -1..1, always from the same noise, of each class in turn."""
    labels = [k % len(CLASSES) for k in range(NUM_IMAGES)]
    body = {"model": model, "sampler": sampler, "num_steps": num_steps, "schedule": schedule, **GUIDANCE}
    body |= {"num_images": NUM_IMAGES, "seed": 1, "class_labels": labels}
    response = call(client, "POST", "/v1/samples", json=body, headers={"Accept": "application/x-npy"})
    return np.clip(np.load(io.BytesIO(response.content)), -1, 1)


def best_untuned(client: httpx.Client, model: str, num_calls: int, teacher: np.ndarray) -> Way:
    """The one of our samplers without noise that comes nearest to the teacher with that many network calls."""
    ways = []
    for name, facts in SAMPLER_FACTS.items():
        if not facts.stochastic and num_calls % facts.calls_per_step == 0:
            images = sample(client, model, name, num_calls // facts.calls_per_step)
            ways.append(Way(name, num_calls, images, distance(images, teacher)))
    return min(ways, key=lambda way: way.distance)


def distance(images: np.ndarray, teacher: np.ndarray) -> float:
    """The mean Euclidean distance of images from the same noise."""
    return float(np.sqrt(np.square(images - teacher).sum(axis=(1, 2, 3))).mean())


def measure(client: httpx.Client, model: str, schedules: dict[int, Json], teacher: np.ndarray) -> list[Comparison]:
    """Sample each schedule and its untuned rivals."""
    comparisons = []
    for num_calls, schedule in sorted(schedules.items()):
        images = sample(client, model, SAMPLER, num_calls, schedule["id"])
        tuned = Way(schedule["status"], num_calls, images, distance(images, teacher))
        untuned, doubled = (best_untuned(client, model, n, teacher) for n in (num_calls, 2 * num_calls))
        comparisons.append(Comparison(untuned, doubled, tuned))
    return comparisons


def print_table(comparisons: list[Comparison]) -> None:
    """All distances, in 80 columns."""
    console.print(f"Mean distance to the teacher's images, {NUM_IMAGES} from the same noise")
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("network calls", "right"), ("", "left"), ("distance", "right")):
        table.add_column(name, justify=justify, no_wrap=True)
    for comparison in comparisons:
        for way, name in (
            (comparison.untuned, f"best untuned: {comparison.untuned.name}"),
            (comparison.doubled, f"best untuned: {comparison.doubled.name}"),
            (comparison.tuned, f"tuned: {comparison.tuned.name}"),
        ):
            table.add_row(str(way.num_calls), name, f"{way.distance:.2f}")
        table.add_section()
    console.print(table)


def in_a_sentence(comparisons: list[Comparison]) -> str:
    """A sentence on what tuning brought, from the figures alone."""
    return f"Beside the best untuned sampler, tuned images come {'; '.join(map(_gain, comparisons))}."


def _gain(comparison: Comparison) -> str:
    calls, tuned, doubled = comparison.tuned.num_calls, comparison.tuned.distance, comparison.doubled.distance
    times = comparison.untuned.distance / tuned
    gain = f"{times:.1f} times as near to the teacher's" if times > 1 else "no nearer to the teacher's"
    beside_doubled = "nearer" if tuned < doubled else "not nearer"
    return f"with {calls} calls {gain}, {beside_doubled} than untuned with {comparison.doubled.num_calls}"


def write_picture(path: Path, comparisons: list[Comparison], teacher: np.ndarray) -> None:
    """A block for each number of calls: an image of each class by the teacher, tuned, untuned, and untuned with twice
    as many calls. Below are their differences from the teacher's images, and beside them the mean distance as a bar."""
    right, title = 150, 44
    block_height = title + TILE + 10 + 3 * ROW_HEIGHT
    sheet = Sheet(176, len(CLASSES), right, block_height * len(comparisons) + MARGIN)
    longest = max(way.distance for each in comparisons for way in (each.untuned, each.doubled, each.tuned)) or 1.0
    for b, comparison in enumerate(comparisons):
        y = b * block_height
        calls = f"{comparison.tuned.num_calls} network calls"
        sheet.draw.text((MARGIN, y + title // 2 + 6), calls, INK, sheet.font, anchor="lm")
        sheet.draw.text((sheet.width - right + 14, y + title // 2 + 6), "off by", QUIET, sheet.small, anchor="lm")
        y += title
        sheet.row(y, "teacher", f"{TEACHER_NUM_STEPS} calls", teacher)
        y += TILE + 10
        for name, way, colour in (
            ("tuned", comparison.tuned, TUNED),
            ("best untuned", comparison.untuned, UNTUNED),
            ("best untuned", comparison.doubled, UNTUNED),
        ):
            note = "" if way is comparison.tuned else f", {way.name}"
            sheet.row(y, name, f"{way.num_calls} calls{note}", way.images, teacher)
            bar = sheet.width - right + 14, y + TILE // 2
            length = round((right - MARGIN - 60) * way.distance / longest)
            sheet.draw.rectangle((*bar, bar[0] + length, bar[1] + TILE), colour)
            place = sheet.width - MARGIN, bar[1] + TILE // 2
            sheet.draw.text(place, f"{way.distance:.1f}", INK, sheet.font, anchor="rm")
            y += ROW_HEIGHT
    sheet.image.save(path, optimize=True)


class Sheet:
    """A picture with rows of images, each named at the left.

    Args:
        left, right: the pixels beside the images. columns: the images of a row.
    """

    def __init__(self, left: int, columns: int, right: int, height: int) -> None:
        self.left, self.columns = MARGIN + left, columns
        self.width = self.left + columns * (TILE + GAP) + right
        self.image = Image.new("RGB", (self.width, height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font, self.small = ImageFont.load_default(19), ImageFont.load_default(15)

    def row(self, y: int, name: str, note: str, images: np.ndarray, teacher: np.ndarray | None = None) -> None:
        """Put images in -1..1, and below them their differences from the teacher's, if these are given."""
        self.draw.text((MARGIN, y + TILE // 2 - 11), name, INK, self.font, anchor="lm")
        self.draw.text((MARGIN, y + TILE // 2 + 11), note, QUIET, self.small, anchor="lm")
        self._put(y, as_pixels(images))
        if teacher is not None:
            self._put(y + TILE + GAP, difference(images, teacher))

    def _put(self, y: int, images: np.ndarray) -> None:
        for k, image in enumerate(images[: self.columns]):
            enlarged = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.BICUBIC)
            self.image.paste(enlarged, (self.left + k * (TILE + GAP), y))


def as_pixels(images: np.ndarray) -> np.ndarray:
    """Images `(B, 1, H, W)` in -1..1 as bytes `(B, H, W)`."""
    return np.round((images[:, 0] + 1) * 127.5).astype(np.uint8)


def difference(images: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """How far each pixel is from the teacher's, as colours of `HEAT`, bytes `(B, H, W, 3)`."""
    share = np.clip(np.abs(images - teacher)[:, 0] / MOST_OFF, 0, 1)
    shades = [np.interp(share, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT, strict=True)]
    return np.round(np.stack(shades, axis=-1)).astype(np.uint8)


NEXT = """Next:
  make up                                  the page: http://127.0.0.1:8000
  . .venv/bin/activate                     then, in another terminal:
  timetuner models import fashion32        or your own model's folder
  timetuner tune fashion32 --num-steps 5   some minutes
  timetuner sample fashion32 --num-steps 5
docs/tutorial.md goes on from there; docs/howto/pipelines.md tunes whole pipelines."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path("demo.png"))
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # unwind, and so stop the service
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="timetuner-demo-") as home:
        console.print("Starting the service: API, dispatcher, workers, Valkey, SQLite")
        with running_service(home) as client:
            model = call(client, "POST", "/v1/models", json={"builtin": MODEL}).json()["id"]
            schedules = tune(client, model)
            console.print("Sampling the teacher, and every untuned sampler")
            teacher = sample(client, model, SAMPLER, TEACHER_NUM_STEPS)
            comparisons = measure(client, model, schedules, teacher)
    print_table(comparisons)
    console.print(in_a_sentence(comparisons))
    for schedule in schedules.values():
        if schedule["status"] == "rejected":
            console.print(f"{schedule['num_steps']} calls: {schedule['evaluation']['summary']}")
    write_picture(args.picture, comparisons, teacher)
    console.print(f"Wrote {args.picture}: columns from the same noise. {time.monotonic() - started:.0f} s in all.\n")
    console.print(NEXT, highlight=False)


if __name__ == "__main__":
    main()
