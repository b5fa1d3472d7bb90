"""Tune a pipeline of diffusers, and show in pictures what it brought: `docs/images/pipeline.png`.

    python examples/pipeline_pictures.py --out docs/images/pipeline.png

The pipeline is a `DDPMPipeline` of the bundled model of clothes. Such a pipeline has no classes, so the embedding of
"no class" is added to that of the time: the network is the same function, without the argument. Seeded; about a minute
on one core.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import INK, MARGIN, ROW_HEIGHT, TILE, Sheet, distance
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel

from timetuner_core import tune_pipeline
from timetuner_core.catalog import BUNDLED, builtin_specs
from timetuner_core.grids import teacher_timesteps
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.models.schedulers import read_scheduler_config

MODEL = "fashion32"
NUM_STEPS, MANY_STEPS = 5, 50
NUM_TUNED = 32  # More than by default, as this network is fast.
NUM_IMAGES, SEED = 10, 1  # Neither tuning nor its evaluation has seen this noise.


def unconditional(unet: UNet2DModel, null_class: int) -> UNet2DModel:
    """A network without classes, which computes what `unet` does for the class that stands for none."""
    free = UNet2DModel.from_config({**unet.config, "num_class_embeds": None})
    weights = unet.state_dict()
    bias = "time_embedding.linear_2.bias"
    weights[bias] = weights[bias] + weights.pop("class_embedding.weight")[null_class]
    free.load_state_dict(weights)
    return free.requires_grad_(False).eval()


def sample(pipeline: Any, scheduler: Any, num_steps: int) -> np.ndarray:
    """Images `(NUM_IMAGES, 1, 32, 32)` in -1..1, always from the same noise."""
    pipeline.scheduler = scheduler
    generator = torch.Generator().manual_seed(SEED)
    images = pipeline(NUM_IMAGES, generator, num_inference_steps=num_steps, output_type="np").images
    return 2 * np.moveaxis(images, -1, 1) - 1


def write_picture(path: Path, ways: list[tuple[str, str, np.ndarray]], many: np.ndarray) -> None:
    """A row of images for each way, by its name and a note, and below it the differences from many steps."""
    top = MARGIN + TILE + 10
    sheet = Sheet(184, NUM_IMAGES, 150 + MARGIN, top + len(ways) * ROW_HEIGHT)
    sheet.row(MARGIN, "teacher", f"{MANY_STEPS} steps", many)
    for r, (name, note, images) in enumerate(ways):
        y = top + r * ROW_HEIGHT
        sheet.row(y, name, note, images, many)
        place = sheet.width - MARGIN, y + TILE
        sheet.draw.text(place, f"off by {distance(images, many):.1f}", INK, sheet.font, anchor="rm")
    sheet.image.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    unet = UNet2DModel.from_pretrained(BUNDLED / MODEL, subfolder="unet", torch_dtype=torch.float32)
    own = DDIMScheduler.from_pretrained(BUNDLED / MODEL, subfolder="scheduler")
    pipeline = DDPMPipeline(unconditional(unet, builtin_specs()[MODEL]["null_class_label"]), own)
    pipeline.set_progress_bar_config(disable=True)
    schedule = tune_pipeline(pipeline, None, NUM_STEPS, num_samples=NUM_TUNED, num_held_out=NUM_TUNED)
    print({name: schedule.evaluation[name] for name in ("verdict", "reason", "distances")})

    tuned, solver = schedule.scheduler(pipeline), DPMSolverMultistepScheduler.from_config(own.config)
    timesteps = teacher_timesteps(read_scheduler_config(own.config).noise_schedule, MANY_STEPS)
    teacher = {"timesteps": timesteps.tolist(), "t_ratios": [1.0] * MANY_STEPS, "sampler": schedule.sampler}
    many = sample(pipeline, TimeTunerScheduler.from_schedule(own, teacher), MANY_STEPS)
    ways = [
        ("tuned", f"{NUM_STEPS} steps", sample(pipeline, tuned, NUM_STEPS)),
        ("DPM-Solver++", f"{NUM_STEPS} steps", sample(pipeline, solver, NUM_STEPS)),
        ("its own: DDIM", f"{NUM_STEPS} steps", sample(pipeline, own, NUM_STEPS)),
        ("its own: DDIM", f"{2 * NUM_STEPS} steps", sample(pipeline, own, 2 * NUM_STEPS)),
    ]
    for name, note, images in ways:
        print(f"{name}, {note}: {distance(images, many):.2f}")
    write_picture(args.out, ways, many)


if __name__ == "__main__":
    main()
