"""The main job, end to end, as an HTTP client of a service started for the occasion: `make demo`.

Starts `timetuner up`, registers the bundled digits model, tunes 5- and 10-step DDIM with and without
classifier-free guidance, samples before and after from the same noise, prints what tuning brought and
writes `demo.png`. Everything it started is stopped at the end.
"""

import argparse
import io
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
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Json = dict[str, Any]
GUIDANCES: list[Json] = [
    {"guidance_type": "uncond"},
    {"guidance_type": "classifier-free", "guidance_scale": 2.0},
]
NUM_STEPS = (5, 10)
TEACHER_NUM_STEPS = 100
IMAGES_PER_ROW = 10

console = Console()


@contextmanager
def running_service(home: str) -> Iterator[httpx.Client]:
    """`timetuner up` on a free port, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service", "up", "--port", str(port), "--home", home]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if "ready" not in process.stdout.readline():
            raise SystemExit("the service did not start; its messages are above")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=150) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def call(client: httpx.Client, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """A request whose refusal is an error that says why."""
    response = client.request(method, path, **kwargs)
    if response.is_error:
        raise SystemExit(f"{method} {path}: {response.status_code} {response.text}")
    return response


def tune(client: httpx.Client, model: str) -> list[Json]:
    """Submit one job per guidance and step count, show their progress, and return them once over."""
    jobs = [
        call(client, "POST", "/v1/tuning-jobs", json={"model": model, "num_steps": num_steps, **guidance}).json()
        for guidance in GUIDANCES
        for num_steps in NUM_STEPS
    ]
    columns = (TextColumn("{task.description:34}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = [progress.add_task(describe(job["request"]), total=1.0, start=False) for job in jobs]
        while True:
            jobs = [call(client, "GET", f"/v1/tuning-jobs/{job['id']}").json() for job in jobs]
            for bar, job in zip(bars, jobs, strict=True):
                if job["state"] != "queued":
                    progress.start_task(bar)
                    progress.update(bar, completed=job["progress"])
                if job["finished_at"]:
                    progress.stop_task(bar)
            if all(job["finished_at"] for job in jobs):
                return jobs
            time.sleep(0.5)


def describe(request: Json) -> str:
    scale = f" x{request['guidance_scale']:g}" if request["guidance_type"] != "uncond" else ""
    return f"DDIM {request['num_steps']:>2} steps, {request['guidance_type']}{scale}"


def sample(client: httpx.Client, model: str, request: Json, num_steps: int, schedule: str) -> np.ndarray:
    """One row of images, `(IMAGES_PER_ROW, 1, 8, 8)`, always from the same noise."""
    body = {name: request[name] for name in ("guidance_type", "guidance_scale")}
    body |= {"model": model, "num_steps": num_steps, "schedule": schedule, "num_images": IMAGES_PER_ROW, "seed": 1}
    if request["guidance_type"] != "uncond":
        body["class_labels"] = list(range(IMAGES_PER_ROW))
    response = call(client, "POST", "/v1/samples", json=body, headers={"Accept": "application/x-npy"})
    return np.load(io.BytesIO(response.content))


def print_table(schedules: list[Json]) -> None:
    table = Table(title="Untuned → tuned, from the same held-out noise")
    for name in ("schedule", "teacher L2", "Fréchet", "tuning", "verdict"):
        table.add_column(name, no_wrap=True)
    for schedule in schedules:
        e = schedule["evaluation"]
        table.add_row(
            describe(schedule),
            f"{e['teacher_l2_before']:.3f} → {e['teacher_l2_after']:.3f}",
            f"{e['frechet_before']:.3f} → {e['frechet_after']:.3f}",
            f"{e['wall_time_seconds']:.0f} s",
            "accepted" if schedule["status"] == "accepted" else "rejected",
        )
    console.print(table)
    console.print("teacher L2: mean distance to the 100-step teacher's samples from the same noise; Fréchet: distance")
    console.print("to the data, in pixel space; rejected: not significantly better, so `auto` samples untuned.")


def write_picture(path: Path, blocks: list[tuple[str, list[tuple[str, np.ndarray]]]]) -> None:
    """One block per schedule: rows of images from the same noise, one row per way of sampling."""
    tile, gap, margin, title = 48, 6, 110, 26
    row_height = tile + gap
    block_height = title + sum(row_height for _ in blocks[0][1]) + 10
    sheet = Image.new("L", (margin + IMAGES_PER_ROW * (tile + gap) + 10, block_height * len(blocks)), 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for b, (heading, rows) in enumerate(blocks):
        top = b * block_height
        draw.text((10, top + 6), heading, 0, font)
        for r, (name, images) in enumerate(rows):
            y = top + title + r * row_height
            draw.text((10, y + tile // 2 - 8), name, 60, font)
            pixels = np.round((np.clip(images[:, 0], -1, 1) + 1) * 127.5).astype(np.uint8)
            for k, image in enumerate(pixels):
                enlarged = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (margin + k * (tile + gap), y))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path("demo.png"))
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="timetuner-demo-") as home:
        console.print("Starting the service: API, dispatcher, workers, Valkey, SQLite")
        with running_service(home) as client:
            model = call(client, "POST", "/v1/models", json={"builtin": "digits8"}).json()["id"]
            jobs = tune(client, model)
            if failed := [job for job in jobs if job["state"] != "succeeded"]:
                raise SystemExit(f"{failed[0]['id']} {failed[0]['state']}: {failed[0]['error']}")
            schedules = call(client, "GET", f"/v1/schedules?model={model}").json()["items"][::-1]
            print_table(schedules)
            blocks = []
            for schedule in schedules:
                request = {name: schedule[name] for name in ("guidance_type", "guidance_scale")}
                # What `auto` gives: the tuned schedule, or, if that was rejected, the untuned one.
                tuned = "tuned" if schedule["status"] == "accepted" else "auto: untuned"
                rows = [
                    (f"{TEACHER_NUM_STEPS} steps", sample(client, model, request, TEACHER_NUM_STEPS, "none")),
                    ("untuned", sample(client, model, request, schedule["num_steps"], "none")),
                    (tuned, sample(client, model, request, schedule["num_steps"], "auto")),
                ]
                blocks.append((describe(schedule), rows))
            write_picture(args.picture, blocks)
            console.print(f"Wrote {args.picture}: each row from the same noise.")
    console.print(f"All stopped. {time.monotonic() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
