#!/bin/sh
# diffusers 0.42.1: DDIMScheduler with timestep_spacing="trailing" steps to other noise levels than it starts the next step
# from, unless the number of steps divides the number of training steps.
#
# Expected: with a network that names the noise in x_t exactly, which is then the same at every step, DDIM returns x0 to
# rounding, whatever its steps; it does so with the spacing "leading".
# Seen: in 3 steps it asks the network at 999, 666, 332, but steps to 666, 333 and clean data: x at 333 is taken for x at
# 332. In 600 steps, which are 1 or 2 training steps apart, each goes only 1 back, and noise is left in x0.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if command -v uv >/dev/null; then
    uv venv --quiet --python '>=3.11' "$folder/venv"
    install="uv pip install --quiet --python $folder/venv/bin/python"
else
    python3 -m venv "$folder/venv"
    install="$folder/venv/bin/python -m pip install --quiet"
fi
$install diffusers==0.42.1 torch==2.15.0 numpy

"$folder/venv/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import DDIMScheduler

assert diffusers.__version__ == "0.42.1"


def error(spacing, num_steps):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.ones(1, 1, 64, 64), torch.randn(1, 1, 64, 64, generator=generator)
    x = scheduler.add_noise(x0, noise, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        x = scheduler.step(noise, t, x).prev_sample
    print(f"{spacing}, {num_steps} steps from {scheduler.timesteps[:3].tolist()}: x0 is off by {(x - x0).abs().max():.2g}")
    return float((x - x0).abs().max())


assert error("leading", 3) < 1e-4 and error("trailing", 4) < 1e-4, "this has changed"
assert error("trailing", 3) > 1e-3 and error("trailing", 600) > 0.1, "this has changed"
PYTHON
