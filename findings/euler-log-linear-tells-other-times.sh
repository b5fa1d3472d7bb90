#!/bin/sh
# diffusers 0.42.1: EulerDiscreteScheduler with interpolation_type="log_linear" tells the network times that do not belong to the
# noise in its input, and stops before the noise is gone.
#
# Expected: as with "linear" and with use_exponential_sigmas=True, timesteps[i] is the time whose noise level is sigmas[i], and
# the level after the last step is 0.
# Seen: in 5 steps the levels of the inputs are 157, 22.8, 3.30, 0.477 and 0.069, where the times told have 157, 17.2, 3.42,
# 0.953 and 0.0100. There are seven levels for five steps, so the last step ends at 0.0100 and not at 0. In one step the
# input has the level 157, and the network is told time 0, whose level is 0.01.
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
$install diffusers==0.42.1 torch==2.15.0 numpy scipy

"$folder/venv/bin/python" - <<'PYTHON'
import diffusers
import numpy as np
from diffusers import EulerDiscreteScheduler

assert diffusers.__version__ == "0.42.1"


def levels(num_steps, **options):
    """The noise levels of the inputs, those of the times that are told, and the level after the last step."""
    scheduler = EulerDiscreteScheduler(**options)
    scheduler.set_timesteps(num_steps)
    alphas = scheduler.alphas_cumprod.double().numpy()
    log_sigmas = 0.5 * np.log((1 - alphas) / alphas)
    told = np.exp(np.interp(scheduler.timesteps.double().numpy(), np.arange(len(log_sigmas)), log_sigmas))
    sigmas = scheduler.sigmas.double().numpy()
    print(options or "the defaults", "inputs", sigmas[:num_steps].round(4), "told", told.round(4), "end", sigmas[num_steps])
    return sigmas[:num_steps], told, sigmas[num_steps]


for options in ({}, {"use_exponential_sigmas": True}):
    inputs, told, end = levels(5, **options)
    assert np.allclose(inputs, told, rtol=0.01) and end == 0, "this has changed"
inputs, told, end = levels(5, interpolation_type="log_linear")
assert np.abs(inputs / told - 1).max() > 0.4 and end > 0.009, "this has changed"
inputs, told, _ = levels(1, interpolation_type="log_linear")
assert inputs[0] > 10_000 * told[0], "this has changed"
PYTHON
