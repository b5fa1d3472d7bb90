"""The main job, end to end, as an HTTP client of a service started for the occasion: `make demo`.

Starts `timetuner up`, registers the bundled digits model, tunes 5- and 10-step DDIM with and without
classifier-free guidance, samples before and after from the same noise, prints what tuning brought and
writes `demo.png`. Everything it started is stopped at the end, however it ends.
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
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Json = dict[str, Any]
# The longest job first, so that two workers finish at about the same time.
SETTINGS: list[Json] = [
    {"guidance_type": "classifier-free", "guidance_scale": 2.0, "num_steps": 10},
    {"guidance_type": "classifier-free", "guidance_scale": 2.0, "num_steps": 5},
    {"guidance_type": "uncond", "num_steps": 10},
    {"guidance_type": "uncond", "num_steps": 5},
]
TEACHER_NUM_STEPS = 100
# Half of the service's defaults: two cores need two minutes.
EFFORT: Json = {
    "tuner": {"objective": "solver", "total_iters": 4},
    "evaluation": {"num_samples": 256, "teacher_num_steps": TEACHER_NUM_STEPS},
}
IMAGES_PER_ROW = 10
STOP_SECONDS = 60

console = Console(width=max(80, Console().width))  # the table needs 80 columns, whatever a log says it has


@contextmanager
def running_service(home: str) -> Iterator[httpx.Client]:
    """`timetuner up` on a free port, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service", "up", "--port", str(port), "--home", home]
    # 8x8 images are too small to share among threads, which on a busy machine would wait for each other.
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


def tune(client: httpx.Client, model: str) -> list[Json]:
    """Submit one job per setting, show their progress, and return them once over."""
    jobs = [
        call(client, "POST", "/v1/tuning-jobs", json={"model": model, **setting, **EFFORT}).json()
        for setting in SETTINGS
    ]
    console.print(f"Tuning {len(jobs)} schedules, two at a time")
    columns = (TextColumn("{task.description:30}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = [progress.add_task(describe(job["request"]), total=1.0, start=False) for job in jobs]
        while True:
            jobs = [call(client, "GET", f"/v1/tuning-jobs/{job['id']}").json() for job in jobs]
            for bar, job in zip(bars, jobs, strict=True):
                if job["state"] != "queued":
                    progress.start_task(bar)
                    progress.update(bar, completed=job["progress"])
                if job["finished_at"] and not progress.tasks[bar].stop_time:
                    progress.stop_task(bar)
                    if not console.is_terminal:  # a log shows bars only once all is over
                        console.print(f"{describe(job['request'])}: {job['state']}")
            if all(job["finished_at"] for job in jobs):
                return jobs
            time.sleep(0.5)


def describe(request: Json) -> str:
    return f"{request['num_steps']} steps, {guidance(request)}"


def guidance(request: Json) -> str:
    scale = f" ×{request['guidance_scale']:g}" if request["guidance_type"] != "uncond" else ""
    return request["guidance_type"] + scale


def before_after(schedule: Json, figure: str) -> str:
    return f"{schedule['evaluation'][f'{figure}_before']:.3f} → {schedule['evaluation'][f'{figure}_after']:.3f}"


def sample(client: httpx.Client, model: str, request: Json, num_steps: int, schedule: str) -> np.ndarray:
    """One row of images, `(IMAGES_PER_ROW, 1, 8, 8)`, always from the same noise."""
    body = {name: request[name] for name in ("guidance_type", "guidance_scale")}
    body |= {"model": model, "num_steps": num_steps, "schedule": schedule, "num_images": IMAGES_PER_ROW, "seed": 1}
    if request["guidance_type"] != "uncond":
        body["class_labels"] = list(range(IMAGES_PER_ROW))
    response = call(client, "POST", "/v1/samples", json=body, headers={"Accept": "application/x-npy"})
    return np.load(io.BytesIO(response.content))


def print_table(schedules: list[Json]) -> None:
    """The gains of tuning, in 80 columns."""
    first = schedules[0]["evaluation"]
    title = f"DDIM on {first['num_samples']} held-out noises, untuned → tuned"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("guidance", overflow="fold")  # the one that may wrap, so that no figure is cut
    for name, justify in (("steps", "right"), ("teacher L2", "left"), ("Fréchet", "left")):
        table.add_column(name, justify=justify, no_wrap=True)
    table.add_column("tuning", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for schedule in schedules:
        table.add_row(
            guidance(schedule),
            str(schedule["num_steps"]),
            before_after(schedule, "teacher_l2"),
            before_after(schedule, "frechet"),
            f"{schedule['evaluation']['wall_time_seconds']:.0f} s",
            schedule["status"],
        )
    console.print(table)
    console.print(f"teacher L2: mean distance to the {first['teacher_num_steps']}-step sampler's images, same noise")
    console.print(
        "Fréchet: distance to the data, guided to the teacher's images, in pixels; tuning: wall time, evaluation apart"
    )
    console.print("accepted: teacher L2 fell beyond chance (95 % interval), and nothing else rose")
    for schedule in schedules:
        if schedule["status"] == "rejected":
            verdict, reason = schedule["evaluation"]["verdict"], schedule["evaluation"]["reason"]
            console.print(f"{describe(schedule)}: {verdict}, {reason}; `auto` falls back to untuned")


def write_picture(path: Path, blocks: list[tuple[str, list[tuple[str, np.ndarray]]]]) -> None:
    """One block per schedule: rows of images from the same noise, one row per way of sampling."""
    tile, gap, margin, left, title, below = 64, 6, 16, 104, 34, 18
    block_height = title + len(blocks[0][1]) * (tile + gap) + below
    width = left + IMAGES_PER_ROW * (tile + gap) - gap + margin
    sheet = Image.new("L", (width, margin // 2 + block_height * len(blocks)), 255)
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(18), ImageFont.load_default(15)
    for b, (heading, rows) in enumerate(blocks):
        top = margin // 2 + b * block_height
        draw.text((margin, top + title // 2), heading, 0, font, anchor="lm")
        for r, (name, images) in enumerate(rows):
            y = top + title + r * (tile + gap)
            draw.text((margin, y + tile // 2), name, 70, small, anchor="lm")
            pixels = np.round((np.clip(images[:, 0], -1, 1) + 1) * 127.5).astype(np.uint8)
            for k, image in enumerate(pixels):
                enlarged = Image.fromarray(image).resize((tile, tile), Image.Resampling.BICUBIC)
                sheet.paste(enlarged, (left + k * (tile + gap), y))
    sheet.save(path, optimize=True)


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
            model = call(client, "POST", "/v1/models", json={"builtin": "digits8"}).json()["id"]
            jobs = tune(client, model)
            if failed := [job for job in jobs if job["state"] != "succeeded"]:
                raise SystemExit(f"{failed[0]['id']} {failed[0]['state']}: {failed[0]['error']}")
            schedules = call(client, "GET", f"/v1/schedules?model={model}").json()["items"]
            schedules.sort(key=lambda schedule: (schedule["guidance_type"], schedule["num_steps"]))
            print_table(schedules)
            write_picture(args.picture, [picture_block(client, model, schedule) for schedule in schedules])
            console.print(f"Wrote {args.picture}: each block's rows from the same noise.")
    console.print(f"All stopped. {time.monotonic() - started:.0f} s in all.")


def picture_block(client: httpx.Client, model: str, schedule: Json) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """A heading, and the teacher's, the untuned and the tuned row."""
    num_steps = schedule["num_steps"]
    # `auto` gives the tuned schedule, or, if that was rejected, the untuned one.
    tuned = "tuned" if schedule["status"] == "accepted" else "auto: untuned"
    rows = [
        (f"{TEACHER_NUM_STEPS} steps", sample(client, model, schedule, TEACHER_NUM_STEPS, "none")),
        (f"{num_steps}, untuned", sample(client, model, schedule, num_steps, "none")),
        (f"{num_steps}, {tuned}", sample(client, model, schedule, num_steps, "auto")),
    ]
    before, after = (schedule["evaluation"][f"teacher_l2_{when}"] for when in ("before", "after"))
    heading = (
        f"DDIM, {describe(schedule)}: distance to {TEACHER_NUM_STEPS} steps {before:.3f} untuned, {after:.3f} tuned"
    )
    return heading.replace("×", "x"), rows  # the picture's font has no ×


if __name__ == "__main__":
    main()
