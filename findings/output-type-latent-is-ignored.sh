#!/bin/sh
# diffusers 0.42.1: DiTPipeline and DDPMPipeline ignore output_type="latent".
#
# Expected: as StableDiffusionPipeline does, they return the latents as a tensor, or say that they accept other types.
# Seen: both return images as a NumPy array in [0, 1], of another layout, without an error. DDPMPipeline's has even lost
# what lay outside of that range.
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
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel

assert diffusers.__version__ == "0.42.1"
torch.manual_seed(0)
sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}
dit = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, sample_size=8, patch_size=2, num_embeds_ada_norm=1000)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
calls = {
    "DiTPipeline": lambda: DiTPipeline(dit, vae, DDIMScheduler())([1], num_inference_steps=2, output_type="latent"),
    "DDPMPipeline": lambda: DDPMPipeline(unet, DDIMScheduler())(num_inference_steps=2, output_type="latent"),
}
for name, call in calls.items():
    given = call().images
    print(name, type(given).__name__, given.shape, float(np.min(given)), float(np.max(given)))
    assert isinstance(given, np.ndarray), "this has changed"
    assert given.shape == (1, 8, 8, 3), "this has changed"
    assert np.min(given) >= 0 and np.max(given) <= 1, "this has changed"
PYTHON
