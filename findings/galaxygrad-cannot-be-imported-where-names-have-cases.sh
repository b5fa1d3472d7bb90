#!/bin/sh
# galaxygrad 0.2.1: it cannot be imported where the names of files have cases, as on Linux, and its generateSamples fails
# wherever it is.
#
# Expected: after `pip install galaxygrad`, `import galaxygrad` works, and generateSamples(hi_res=False) gives a sample.
# Seen: importing it opens eqx_roman_ScoreNet120.eqx, where the wheel has eqx_roman_Scorenet120.eqx. With that file by the
# other name it can be imported, and generateSamples raises a NameError: generate.py imports HSC_32 and HSC_64 and uses
# HSC_ScoreNet32 and HSC_ScoreNet64.
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
$install galaxygrad==0.2.1 jax==0.10.2 jaxlib==0.10.2 equinox==0.13.8 einops==0.8.1 diffrax==0.7.2

cd "$folder"
if "$folder/venv/bin/python" -c 'import galaxygrad' 2>error; then
    echo "this has changed" && exit 1
fi
tail -1 error
grep -q 'FileNotFoundError.*eqx_roman_ScoreNet120.eqx' error

"$folder/venv/bin/python" - <<'PYTHON'
import importlib.util
from pathlib import Path

package = Path(importlib.util.find_spec("galaxygrad").submodule_search_locations[0])
(package / "eqx_roman_ScoreNet120.eqx").write_bytes((package / "eqx_roman_Scorenet120.eqx").read_bytes())
import galaxygrad

try:
    galaxygrad.generateSamples(hi_res=False)
except NameError as error:
    print(f"NameError: {error}")
else:
    raise SystemExit("this has changed")
PYTHON
