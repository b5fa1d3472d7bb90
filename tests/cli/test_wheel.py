"""The wheel, as who installs it has it: types, licences, and what an index shows."""

import re
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from hatchling.build import build_wheel

from tests.cli.test_extras import OURS, modules

ROOT = Path(__file__).parents[2]
PROGRAM = """
from service.client import TimeTuner

client = TimeTuner("http://127.0.0.1:8000")
schedule = client.schedules.get("sch_1")
reveal_type(schedule.t_ratios)
reveal_type(client.samples.create(model="m", num_steps=5).images)
client.tuning_jobs.create(model="m", num_steps="five")
client.tuning_jobs.create(model="m", num_step=5)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(ROOT)
        return folder / build_wheel(str(folder))


def test_an_index_is_told_licences_and_systems(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = message_from_bytes(archive.read(next(name for name in names if name.endswith("METADATA"))))
    licences = ["service/web/static/htmx", "timetuner_core/bundled/digits", "timetuner_core/bundled/fashion"]
    assert about.get_all("License-File") == ["LICENSE", *(f"{name}.LICENSE" for name in licences)]
    assert about["License-Expression"] == "MIT AND 0BSD AND CC-BY-4.0"
    assert "Operating System :: POSIX :: Linux" in (about.get_all("Classifier") or [])
    assert about["Author"] == "The TimeTuner developers"
    shown = about.get_payload()
    assert "make demo" in shown and "openaccess.thecvf.com" in shown
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", shown) == []  # An index has no other files of the repository.
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]


def test_mypy_finds_the_clients_types(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "venv" / "lib" / version / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    for name in {*modules()} - {*OURS}:  # The package without extras needs these, and no more.
        for place in Path(sysconfig.get_path("purelib")).glob(f"{name}*"):
            if place.name.partition(".")[0] == name and not (packages / place.name).exists():
                (packages / place.name).symlink_to(place)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    ratios, images, wrong_type, wrong_name = done.stdout.splitlines()[:4]
    assert ratios.endswith('Revealed type is "list[float]"')
    assert images.endswith('Revealed type is "typing.Sequence[PIL.Image.Image]"')
    assert '"num_steps" to "create" of "TuningJobs" has incompatible type "str"; expected "int"' in wrong_type
    assert 'Unexpected keyword argument "num_step"' in wrong_name
