"""A trial: a told time for each layer of `digits8`, in place of one ratio per step (decision 20).

    python -m benchmarks.layer_ratios

DDIM on the best named grid, unguided. Each residual block is told its own time `t * r`, by a time embedding of its own.
Both kinds of ratios are learned end to end by Adam from the same draws. The distance to a teacher of 100 steps is
measured on 512 noises that tuning has not seen.
"""

import argparse
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from timetuner_core.grids import start_grids, teacher_timesteps
from timetuner_core.models.loading import BUILTIN_FOLDERS, load_builtin

NULL_CLASS = 10
NUM_TUNED, NUM_HELD_OUT, BATCH_SIZE = 256, 512, 16
NUM_ITERS, LR = 100, 1e-2
MIN_RATIO, MAX_RATIO = 0.5, 1.5


class ToldLayers:
    """`digits8`, whose residual blocks may each be told another time."""

    def __init__(self) -> None:
        self.unet: Any = UNet2DModel.from_pretrained(BUILTIN_FOLDERS["digits8"] / "unet")
        self.unet.requires_grad_(False)
        self.schedule = load_builtin("digits8").noise_schedule
        blocks = [module for module in self.unet.modules() if isinstance(module, ResnetBlock2D)]
        self.num_layers = len(blocks)
        self._embeddings: list[Tensor] = []
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._told(number))

    def _told(self, number: int) -> Any:
        return lambda _module, args: (args[0], self._embeddings[number], *args[2:])

    def eps(self, x: Tensor, t: Tensor, ratios: Tensor) -> Tensor:
        """The prediction in x `(B, ...)` at time t `()`, with ratios `(num_layers,)`."""
        label = torch.full((len(x),), NULL_CLASS)
        self._embeddings = [self._embedding(t * ratio, label) for ratio in ratios]
        output: Tensor = self.unet(x, torch.zeros(len(x)), class_labels=label).sample
        return output

    def _embedding(self, t: Tensor, label: Tensor) -> Tensor:
        told = self.schedule.model_input_time(t.clamp(self.schedule.t_min, self.schedule.T)).float()
        embedded = self.unet.time_embedding(self.unet.time_proj(told.expand(len(label))))
        both: Tensor = embedded + self.unet.class_embedding(label)
        return both

    def ddim(self, x: Tensor, timesteps: Tensor, ratios: Tensor) -> Tensor:
        """x0 from x_T `(B, ...)`; ratios `(num_steps, num_layers)`."""
        alphas = self.schedule.marginal_alpha(timesteps).tolist()
        sigmas = self.schedule.marginal_std(timesteps).tolist()
        for i, t in enumerate(timesteps[:-1]):
            eps = self.eps(x, t, ratios[i])
            x0 = (x - sigmas[i] * eps) / alphas[i]
            x = alphas[i + 1] * x0 + sigmas[i + 1] * eps
        return x


def distance(samples: Tensor, taught: Tensor) -> Tensor:
    return (samples - taught).flatten(1).norm(dim=1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ToldLayers()
    schedule, layers = model.schedule, model.num_layers
    teacher = teacher_timesteps(schedule, 100)
    print(f"{layers} layers")
    for seed in range(options.seeds):
        noise = torch.randn(NUM_TUNED + NUM_HELD_OUT, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            taught = model.ddim(noise, teacher, torch.ones(100, layers))
        tuned, held_out = slice(NUM_TUNED), slice(NUM_TUNED, None)
        for num_steps in options.num_steps:
            ones = torch.ones(num_steps, layers)

            def untuned(grid: Tensor, ones: Tensor = ones, noise: Tensor = noise, taught: Tensor = taught) -> float:
                with torch.no_grad():
                    return float(distance(model.ddim(noise[:64], grid, ones), taught[:64]))

            grid = min(start_grids(schedule, num_steps), key=untuned)
            found = {"untuned": ones}
            for name, width in (("one ratio per step", 1), ("one per step and layer", layers)):
                ratios = torch.ones(num_steps, width, requires_grad=True)
                optimizer = torch.optim.Adam([ratios], LR)
                generator = torch.Generator().manual_seed(seed)
                for iteration in range(NUM_ITERS):
                    optimizer.param_groups[0]["lr"] = LR * (1 - iteration / NUM_ITERS)
                    rows = torch.randint(NUM_TUNED, (BATCH_SIZE,), generator=generator)
                    loss = distance(
                        model.ddim(noise[tuned][rows], grid, ratios.expand(-1, layers)), taught[tuned][rows]
                    )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    with torch.no_grad():
                        ratios.clamp_(MIN_RATIO, MAX_RATIO)
                found[name] = ratios.detach().expand(-1, layers)
            with torch.no_grad():
                ends = {
                    name: float(distance(model.ddim(noise[held_out], grid, ratios), taught[held_out]))
                    for name, ratios in found.items()
                }
            print(f"seed {seed}, {num_steps} steps:", {name: round(end, 3) for name, end in ends.items()}, flush=True)


if __name__ == "__main__":
    main()
