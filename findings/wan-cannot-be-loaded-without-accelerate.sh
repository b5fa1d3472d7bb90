#!/bin/sh
# diffusers 0.42.1, without accelerate (which it does not require): networks that keep some modules in float32, such as
# Wan's transformer, are saved but cannot be loaded again.
#
# Expected: save_pretrained and from_pretrained work for every network, a little slower without accelerate, as the log
# says.
# Seen: from_pretrained sets low_cpu_mem_usage=False itself, as accelerate is missing, and then raises a ValueError that
# it cannot be False. The message names neither accelerate nor a remedy.
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

"$folder/venv/bin/python" - "$folder/transformer" <<'PYTHON'
import sys

import diffusers
from diffusers import WanTransformer3DModel

assert diffusers.__version__ == "0.42.1"
sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 16, "ffn_dim": 16}
WanTransformer3DModel(**sizes, num_layers=1).save_pretrained(sys.argv[1])
try:
    WanTransformer3DModel.from_pretrained(sys.argv[1])
except ValueError as error:
    print("ValueError:", error)
    assert "`low_cpu_mem_usage` cannot be False" in str(error), "this has changed"
else:
    sys.exit("this has changed: it loads")
PYTHON
