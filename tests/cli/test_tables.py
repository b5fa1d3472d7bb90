"""Tables and facts that commands print: what fits a terminal, and what scripts read."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.cli.options import whole_id
from service.cli.output import CommandError, print_facts, print_table, rounded, short_id
from service.client import choices
from service.client.choices import BUILTINS, GRIDS, OBJECTIVES, SAMPLERS
from tests.cli.conftest import Run
from timetuner_core import catalog
from timetuner_core.tuners import TUNERS

ID, OTHER = "sch_01JD3K5V8Q2M4N6P7R9S0T1V2W", "sch_01JD3K5V8Q2M4N6P7R9S0T1V2X"
COLUMNS = ("id", "model", "steps", "sampler", "guidance", "verdict", "score", "made")


def row() -> tuple[Any, ...]:
    made = datetime.now(UTC) - timedelta(minutes=3)
    return (ID, "digits32-ldm", 10, "dpmpp_2m_sde", "cfg x2.5", "undecided", 0.73456789012345678, made)


def test_a_row_fits_80_columns_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    print_table(COLUMNS, [row()])
    _, line = capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert line.split()[0] == "sch_9S0T1V2W"
    assert "0.7346" in line and "3 min ago" in line
    assert len(line) <= 80


def test_elsewhere_ids_and_times_are_whole_and_a_row_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COLUMNS, [row()] * 2)
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{ID} ") and line.rstrip().endswith("Z") for line in lines)


def test_numbers_have_the_digits_that_mean_something(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts(
        {"score": 0.73456789012345678, "grid": [0.12345678901234567, 1.0], "more": {"a": [1 / 3, {"b": 2 / 3}]}}
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["score 0.7346", "grid 0.1235 1", 'more {"a": [0.3333, {"b": 0.6667}]}']
    assert rounded({"n": 123456, "big": 123456.0, "text": "x"}) == {"n": 123456, "big": 123500.0, "text": "x"}


class Schedules:
    """A service that has these schedules."""

    def __init__(self, *ids: str) -> None:
        self.schedules = self
        self._ids = ids

    def list(self, **_: Any) -> list[Any]:
        return [type("Schedule", (), {"id": id}) for id in self._ids]


def test_a_short_id_is_the_one_that_ends_so_and_is_refused_if_there_are_several_or_none() -> None:
    short = short_id(ID)
    assert short == "sch_9S0T1V2W"
    assert whole_id(Schedules(OTHER, ID), short) == ID  # type: ignore[arg-type]
    for text in (ID, "sch_nope", "production", "auto", "9S0T1V2W"):
        assert whole_id(Schedules(), text) == text  # type: ignore[arg-type]
    again = "sch_01JD3K5V8Q2M4N6P7X9S0T1V2W"
    with pytest.raises(CommandError, match=f"{ID} or {again}; accepted: one of these"):
        whole_id(Schedules(ID, again), short)  # type: ignore[arg-type]
    with pytest.raises(CommandError, match="accepted: a whole id") as refusal:
        whole_id(Schedules(OTHER), short)  # type: ignore[arg-type]
    assert refusal.value.code == 5


def test_the_words_of_help_and_completion_are_those_of_the_service() -> None:
    assert list(SAMPLERS) == list(catalog.SAMPLER_FACTS)
    assert list(OBJECTIVES) == list(TUNERS)
    assert ("default", *catalog.NAMED_GRIDS) == GRIDS
    assert BUILTINS == catalog.BUILTINS
    assert choices.SAMPLERS[0] == "ddim"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("timetuner tune digits8 --sampler dpmpp_2m", ["dpmpp_2m", "dpmpp_2m_sde"]),
        ("timetuner tune digits8 --objective solver,dm", ["solver,dmn"]),
        ("timetuner tune digits8 --timesteps un", ["uniform"]),
        ("timetuner models import mixture-g", ["mixture-gratings"]),
        ("timetuner schedules list --status re", ["rejected"]),
        ("timetuner tune dig", []),  # No service runs here, and none is started.
    ],
)
def test_words_are_completed(timetuner: Run, tmp_path: Any, words: str, completed: list[str]) -> None:
    environment = {"COMP_WORDS": words, "COMP_CWORD": f"{len(words.split()) - 1}", "TIMETUNER_HOME": str(tmp_path)}
    result = timetuner(_TIMETUNER_COMPLETE="complete_bash", **environment)
    assert result.out.split() == completed


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["tune", "--help"], (*SAMPLERS, *OBJECTIVES, *GRIDS, "classifier-free")),
        (["schedules", "list", "--help"], (*SAMPLERS, "accepted", "score")),
        (["models", "import", "--help"], (*BUILTINS, "bfloat16", "pipeline")),
    ],
)
def test_help_lists_what_is_accepted(timetuner: Run, arguments: list[str], values: tuple[str, ...]) -> None:
    shown = "".join(timetuner(*arguments, COLUMNS="250", TERMINAL_WIDTH="250").out.split())
    assert [value for value in values if value not in shown] == []
