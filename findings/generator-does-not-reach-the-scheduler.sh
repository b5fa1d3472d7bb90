#!/bin/sh
# diffusers 0.42.1: DiTPipeline does not pass its generator to its scheduler, so that with DDPMScheduler the same seed gives
# another image each time.
#
# Expected: `generator`, which is documented to make generation deterministic, does so, as it does in DDPMPipeline.
# Seen: two calls with generators of the same seed give different images. Only the first noise is drawn from the generator;
# that of each step is drawn from PyTorch's global one. No warning is given. With DDIMScheduler, which adds none, they agree.
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
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers import UNet2DModel

assert diffusers.__version__ == "0.42.1"
torch.manual_seed(0)
sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}
sizes |= {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2}
dit = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=1000).eval()
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)


def difference(pipeline, *labels):
    pipeline.set_progress_bar_config(disable=True)
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    first, second = (pipeline(*labels, generator=each, num_inference_steps=4, output_type="np").images for each in seeded)
    print(type(pipeline).__name__, type(pipeline.scheduler).__name__, "same seed, difference:", np.abs(first - second).max())
    return np.abs(first - second).max()


assert difference(DDPMPipeline(unet, DDPMScheduler())) == 0, "this has changed"
assert difference(DiTPipeline(dit, vae, DDIMScheduler()), [1]) == 0, "this has changed"
assert difference(DiTPipeline(dit, vae, DDPMScheduler()), [1]) > 0.01, "this has changed"
PYTHON
