#!/bin/sh
# diffusers 0.42.1: a scheduler's arguments given by position are lost by from_config.
#
# Expected: DDPMScheduler(500) and DDPMScheduler(num_train_timesteps=500) are the same scheduler, and
# `DDIMScheduler.from_config(scheduler.config)`, the documented way to change schedulers, keeps the 500.
# Seen: the constructor lists arguments given by position under `_use_default_values`, from_config drops what is listed,
# and the new scheduler has 1000 training steps, other alphas and other timesteps. No warning is given.
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
from diffusers import DDIMScheduler, DDPMScheduler

assert diffusers.__version__ == "0.42.1"
by_name = DDIMScheduler.from_config(DDPMScheduler(num_train_timesteps=500).config)
by_position = DDIMScheduler.from_config(DDPMScheduler(500).config)
steps = by_name.config.num_train_timesteps, by_position.config.num_train_timesteps
print("training steps kept by from_config: by name", steps[0], "by position", steps[1])
for scheduler in (by_name, by_position):
    scheduler.set_timesteps(4)
    print(scheduler.timesteps.tolist(), float(scheduler.alphas_cumprod[-1]))
assert steps == (500, 1000), "this has changed"
PYTHON
