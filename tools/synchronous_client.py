"""Write the client without asyncio from the client for asyncio: the two differ in a few words only.

    python tools/synchronous_client.py            writes service/client/synchronous.py
    python tools/synchronous_client.py --check    fails if that file is not what would be written

`unasync` turns whole folders and leaves the names in annotations that are strings; `unasyncd` needs an older `rich`.
"""

import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "service/client/asynchronous.py"
TARGET = ROOT / "service/client/synchronous.py"

# Patterns of whole words, in the order in which they are replaced.
WORDS = {
    r"The client for asyncio\.": "The client for ordinary code, as tools/synchronous_client.py makes it.",
    r"asyncio": "time",
    r"async (?=def|for|with)": "",
    r"await ": "",
    r"__a(enter|exit)__": r"__\1__",
    r"a(close|read|iter_sse)": r"\1",
    r"Async([A-Z]\w+)": r"\1",
}


def synchronous(text: str) -> str:
    """The synchronous form of a module, formatted as the project's code is."""
    for pattern, replacement in WORDS.items():
        text = re.sub(rf"(?<!\w){pattern}", replacement, text)
    for command in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(TARGET), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> int:
    wanted = synchronous(SOURCE.read_text())
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(wanted)
        return 0
    names = str(TARGET.relative_to(ROOT)), "as made from asynchronous.py"
    difference = difflib.unified_diff(TARGET.read_text().splitlines(True), wanted.splitlines(True), *names)
    sys.stdout.writelines(lines := list(difference))
    if lines:
        print("run `make format`", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
