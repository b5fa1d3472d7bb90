"""Untuned samples of networks that were trained for a few minutes, from where our grids and diffusers' own start.

    python -m benchmarks.starting_time [--iterations 1500] [--num-steps 5]

A U-Net of 1.3 million weights learns to predict eps on the 1,797 handwritten digits of the package, at 16 x 16. After a
few minutes its eps is a few hundredths wrong, which is divided by alpha_t where sampling starts.
"""

import argparse
import tempfile
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from timetuner_core.catalog import BUILTIN_FOLDERS
from timetuner_core.evaluation.distances import Frechet
from timetuner_core.grids import make_timesteps
from timetuner_core.models.diffusion_model import DiffusionModel
from timetuner_core.models.loading import load_folder
from timetuner_core.samplers import initial_noise
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.sampling.starting_time import find_starting_time

NUM_SAMPLES = 512


def digits16() -> Tensor:
    """`(1797, 1, 16, 16)` in -1..1."""
    images = load_file(BUILTIN_FOLDERS["digits32-ldm"] / "data.safetensors")["images"]
    return functional.avg_pool2d(images.float() / 127.5 - 1, 2)


def train(data: Tensor, scheduler: diffusers.DDIMScheduler, iterations: int) -> diffusers.UNet2DModel:
    """A network that predicts eps, by Adam at 1e-3 on batches of 32; seeded."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 56, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(iterations):
        x0 = data[torch.randint(len(data), (32,))]
        t, eps = torch.randint(1000, (32,)), torch.randn_like(x0)
        loss = (network(scheduler.add_noise(x0, eps, t), t).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def stock_samples(model: DiffusionModel, scheduler: diffusers.DDIMScheduler, num_steps: int) -> Tensor:
    """Samples by diffusers' own scheduler."""
    scheduler.set_timesteps(num_steps)
    x, _ = initial_noise(model.sample_shape, list(range(NUM_SAMPLES)), 1.0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model.network(x, t.expand(len(x)).float()), t, x).prev_sample
    return x


def samples(model: DiffusionModel, num_steps: int) -> Tensor:
    grid = make_timesteps(model.noise_schedule, num_steps)
    return generate(model, Guidance("uncond", 1.0), list(range(NUM_SAMPLES)), None, grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--num-steps", type=int, default=5)
    parser.add_argument("--schedules", nargs="+", default=["linear", "squaredcos_cap_v2"])
    options = parser.parse_args()
    data = digits16()
    distance = Frechet.to(data)

    def show(name: str, x: Tensor) -> None:
        print(f"  {name}: standard deviation {x.std():.3f}, Fréchet distance {distance(x).value:.4g}", flush=True)

    print(f"data: standard deviation {data.std():.3f}")
    for schedule in options.schedules:
        clipping = diffusers.DDIMScheduler(beta_schedule=schedule)
        network = train(data, clipping, options.iterations)
        for clip_sample in (True, False):
            scheduler = diffusers.DDIMScheduler(beta_schedule=schedule, clip_sample=clip_sample)
            with tempfile.TemporaryDirectory() as folder:
                network.save_pretrained(Path(folder) / "unet")
                scheduler.save_pretrained(Path(folder) / "scheduler")
                save_file({"images": data}, Path(folder) / "data.safetensors")
                model = load_folder(Path(folder))
            t, x0_error = find_starting_time(model)
            print(f"{schedule}, clip_sample {clip_sample}: t_start {t}, error of x0 there {x0_error:.2f}")
            show("diffusers", stock_samples(model, scheduler, options.num_steps))
            show("from t_start", samples(model.starting_at(t), options.num_steps))
            show("from T", samples(model, options.num_steps))


if __name__ == "__main__":
    main()
