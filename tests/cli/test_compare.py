"""The command line."""

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app

# A quick comparison.
SMALL = ["--num-steps", "2", "--guidance", "uncond", "--samplers", "ddim", "--num-samples", "16", "--jobs", "1"]


def test_compare_writes_a_report(tmp_path: Path) -> None:
    out = tmp_path / "compare"
    arguments = ["--model", "mixture-gratings", *SMALL, "--tuners", "log_snr, gits", "--seed", "3", "--out", str(out)]
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out / "report.html")
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
def test_compare_refuses_a_bad_option_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    defaults = ["--model", "mixture-ring", "--out", str(tmp_path / "compare")]
    result = CliRunner().invoke(app, ["compare", *(arguments if "--out" in arguments else [*defaults, *arguments])])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"timetuner compare: {message}")
    assert not list(tmp_path.iterdir())
