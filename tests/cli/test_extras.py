"""The package without extras is the client and the command, and needs little."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions

import pytest
from packaging.requirements import Requirement

from tests.stack import free_port

MAX_BYTES = 120e6
OURS = ("timetuner", "service", "worker", "migrations", "timetuner_core")
# An importer that finds the standard library, what is allowed, and nothing else.
ALONE = """
import sys
allowed, arguments = set(sys.argv[1].split(",")), sys.argv[2:]

class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed | sys.stdlib_module_names and not top.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["timetuner", *arguments]
if arguments == ["client"]:
    from service.client import AsyncTimeTuner, Samples, Schedule, TimeTuner
    print(TimeTuner("http://127.0.0.1:1"))
else:
    from timetuner import main
    main()
"""


def without_extras() -> set[str]:
    """The names of all distributions that are installed with ours if no extra is named."""
    found: set[str] = set()
    waiting = [Requirement("timetuner")]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found:
            continue
        found.add(name)
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                waiting.append(needed)
    return found


def modules() -> Iterator[str]:
    kept = without_extras()
    for module, distributions in packages_distributions().items():
        if any(re.sub(r"[-_.]+", "-", name).lower() in kept for name in distributions):
            yield module


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["client"], 0, "TimeTuner object"),
        (["tune", "--help"], 0, "Tune a schedule"),
        (["models", "list", "--url", f"http://127.0.0.1:{free_port()}"], 3, "cannot be reached"),
        (["up"], 3, "accepted: pip install 'timetuner[server,worker]' for a service here"),
        (["compare"], 3, "this needs 'torch', which is not installed"),
        (["worker"], 3, "which is not installed"),
    ],
)
def test_client_and_command_do_without_extras_and_name_them(arguments: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-c", ALONE, ",".join([*modules(), *OURS]), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


def test_client_and_command_are_small() -> None:
    files = [file for name in without_extras() - {"timetuner"} for file in distribution(name).files or []]
    sizes = [path.stat().st_size for file in files if (path := file.locate()).is_file()]  # type: ignore[attr-defined]
    assert len(sizes) > 1000
    assert sum(sizes) < MAX_BYTES
