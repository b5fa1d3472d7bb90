#!/bin/sh
# diffusers 0.42.1: DiffusionPipeline.from_pretrained ignores a component it is given, if the pipeline's class counts it
# among its optional ones.
#
# Expected: `DiffusionPipeline.from_pretrained(folder, transformer=mine)` uses `mine`, as documented, and as
# `WanPipeline.from_pretrained(folder, transformer=mine)` does.
# Seen: it loads the saved transformer and uses that. No warning is given. (Which components may be passed is asked of
# DiffusionPipeline, which has no optional ones, instead of the class that model_index.json names.)
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
$install diffusers==0.42.1 torch==2.15.0 transformers==5.24.0 accelerate==1.15.0 numpy

"$folder/venv/bin/python" - "$folder/pipeline" <<'PYTHON'
import sys

import diffusers
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers import WanTransformer3DModel

assert diffusers.__version__ == "0.42.1"


def transformer(seed):
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1
    )


vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
saved, mine = transformer(0), transformer(1)
parts = {"tokenizer": None, "text_encoder": None}
WanPipeline(**parts, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=saved).save_pretrained(sys.argv[1])
used = {}
for loader in (WanPipeline, DiffusionPipeline):
    pipeline = loader.from_pretrained(sys.argv[1], transformer=mine, **parts)
    used[loader.__name__] = pipeline.transformer is mine
    print(loader.__name__, type(pipeline).__name__, "uses the transformer it is given:", used[loader.__name__])
weights = pipeline.transformer.patch_embedding.weight
print("DiffusionPipeline uses the saved one:", torch.equal(weights, saved.patch_embedding.weight))
assert used == {"WanPipeline": True, "DiffusionPipeline": False}, "this has changed"
PYTHON
