#!/bin/sh
# diffusers 0.42.1, without accelerate (which it does not require): group offloading is turned on without complaint, and
# the first call of the network fails.
#
# Expected: apply_group_offloading works without accelerate, or raises an ImportError that names it.
# Seen: it returns, and the network's next call raises a NameError of one of accelerate's functions.
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
import sys

import diffusers
import torch
from diffusers import UNet2DModel
from diffusers.hooks import apply_group_offloading

assert diffusers.__version__ == "0.42.1"
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
cpu = torch.device("cpu")
apply_group_offloading(unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
print("group offloading is on")
try:
    unet(torch.zeros(1, 3, 8, 8), 1)
except NameError as error:
    print("NameError:", error)
    assert "send_to_device" in str(error), "this has changed"
else:
    sys.exit("this has changed: the call succeeds")
PYTHON
