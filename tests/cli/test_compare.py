"""`timetuner compare`"""

import csv
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

# A quick comparison.
SMALL = ["--num-steps", "2", "--guidance", "uncond", "--samplers", "ddim", "--num-samples", "16", "--jobs", "1"]


def test_compare_writes_a_report(tmp_path: Path, timetuner: Run) -> None:
    out = tmp_path / "compare"
    arguments = ["--model", "mixture-gratings", *SMALL, "--tuners", "log_snr, gits", "--seed", "3", "--out", str(out)]
    result = timetuner("compare", *arguments, "--json")
    assert result.code == 0, result.err
    printed = json.loads(result.out)
    assert printed["report"] == str(out / "report.html")
    assert [record["entrant"] for record in printed["results"]] == ["untuned", "log_snr", "gits"]
    kinds = ["quality", "ratios", "report", "results", "results", "trajectories"]
    assert sorted(path.name.replace(".", "-").partition("-")[0] for path in out.iterdir()) == kinds
    with (out / "results.csv").open() as file:
        assert [record["entrant"] for record in csv.DictReader(file)] == ["untuned", "log_snr", "gits"]
    assert "- seed: 3" in (out / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "--model is 'nothing'; accepted: digits8, "),
        (["--num-steps", "3,five"], "--num-steps is '3,five'; accepted: whole numbers, by commas"),
        (["--num-steps", "0"], "--num-steps is 0; accepted: 1 to 1000"),
        (["--guidance", "cfg:much"], "--guidance is 'cfg:much'; accepted: uncond, cfg:SCALE"),
        (["--samplers", "plms"], "--samplers is 'plms'; accepted: ddim, "),
        (["--tuners", "lucky"], "--tuners is 'lucky'; accepted: untuned, "),
        (["--num-samples", "0"], "--num-samples is 0; accepted: 16 to 50000"),
        (["--jobs", "-1"], "--jobs is -1; accepted: "),
        (["--out", __file__], f"--out is '{__file__}'; accepted: a folder that is new"),
    ],
)
def test_compare_refuses_a_bad_option_in_one_line(
    tmp_path: Path, timetuner: Run, arguments: list[str], message: str
) -> None:
    defaults = ["--model", "mixture-ring", "--out", str(tmp_path / "compare")]
    result = timetuner("compare", *(arguments if "--out" in arguments else [*defaults, *arguments]))
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith(f"timetuner: compare: {message}")
    assert not list(tmp_path.iterdir())
