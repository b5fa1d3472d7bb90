"""The start of commands: they start quickly, complete words, and refuse what makes no sense."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main

from service.cli import app
from tests.cli.conftest import Run
from tests.stack import free_port

SLOW = ("torch", "diffusers", "sqlalchemy", "fastapi", "celery", "matplotlib", "uvicorn")
LOADED = f"""
import sys
sys.argv = ["timetuner", *sys.argv[1:]]
from service.cli import main
try:
    main()
finally:
    print([name for name in {SLOW} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["tune", "--help"], ["models", "list"]])
def test_the_command_starts_without_what_only_servers_need(arguments: list[str]) -> None:
    environment = {"TIMETUNER_URL": f"http://127.0.0.1:{free_port()}"}
    command = [sys.executable, "-c", LOADED, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if "--help" in arguments else 3)
    assert done.stderr.splitlines()[-1] == "[]"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each command's words, and its options."""

    def walk(command: typer.main.TyperCommand | typer.main.TyperGroup, words: str) -> Iterator[tuple[str, list[str]]]:
        if isinstance(command, typer.main.TyperGroup):
            for name, each in command.commands.items():
                yield from walk(each, f"{words} {name}")  # type: ignore[arg-type]
        else:
            yield words.strip(), [option for parameter in command.params for option in parameter.opts]

    yield from walk(typer.main.get_command(app), "")  # type: ignore[arg-type]


def test_the_version_is_the_packages(timetuner: Run) -> None:
    assert timetuner("--version").out.strip() == f"timetuner {version('timetuner')}"


def test_every_command_prints_json_on_request() -> None:
    options = dict(commands())
    assert {"tune", "models import", "schedules alias", "keys create", "doctor", "db upgrade"} <= set(options)
    assert [words for words, given in options.items() if "--json" not in given] == ["api", "worker", "dispatcher"]
    assert not [option for given in options.values() for option in given if "key" in option and option.startswith("--")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_words_are_completed(shell: str) -> None:
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'timetuner'; from service.cli import main; main()"]
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the test may be no shell's child
    showing = [*command, "--show-completion", shell]
    script = subprocess.run(showing, env=named, capture_output=True, text=True, check=True)
    assert "_TIMETUNER_COMPLETE" in script.stdout
    variables = {"COMP_WORDS": "timetuner sched", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "timetuner sched"}
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    completing = {"_TIMETUNER_COMPLETE": f"complete_{shell}", **variables, **fish}
    done = subprocess.run(command, env=completing, capture_output=True, text=True, check=False)
    assert "schedules" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nope"], 2, "No such command 'nope'."),
        (["tune", "m"], 2, "Missing option '--num-steps'."),
        (["tune", "m", "--num-steps", "3", "--tuner", "lr"], 2, "'lr'; accepted: NAME=VALUE, such as total_iters=50"),
        (["tune", "m", "--num-steps", "3", "--watch", "--detach"], 2, "accepted: one of them"),
        (["tune", "m", "--num-steps", "3", "--detach"], 3, "accepted: --url, or a service that runs: timetuner up"),
        (["sample", "m", "--num-steps", "3", "--out", "a.gif"], 2, "accepted: a name that ends with .png, .npy, .zip"),
        (["schedules", "alias", "a"], 2, "accepted: either a schedule's ID or --remove-from MODEL"),
        (["models", "import", "./nothere"], 5, "there is no file or folder './nothere'; accepted: a diffusers-format"),
        (["models", "import", "mine.zip"], 5, "there is no file or folder 'mine.zip'; accepted: a diffusers-format"),
        (["models", "list", "--url", "here"], 2, "accepted: one that begins with http:// or https://"),
        (["models", "list", "--url", "http://127.0.0.1:1"], 3, "the service at http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_a_refusal_is_one_line_and_a_code(
    timetuner: Run, tmp_path: str, arguments: list[str], code: int, message: str
) -> None:
    result = timetuner(*arguments, TIMETUNER_HOME=str(tmp_path))
    assert (result.code, result.out) == (code, "")
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("timetuner: ")
    assert message in result.err


@pytest.mark.parametrize("command", ["up", "api"])
def test_a_port_that_another_program_listens_on_is_refused(command: str, timetuner: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = timetuner(command, "--port", str(port), TIMETUNER_HOME=str(tmp_path / "home"))
    said = f"timetuner: {command}: --port is {port}, on which another program listens; accepted: a free port"
    assert (result.code, result.out, result.err.splitlines()) == (3, "", [said])
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("command", ["up", "api", "dispatcher", "keys list"])
def test_settings_that_cannot_be_used_are_a_line_each(command: str, timetuner: Run, tmp_path: Path) -> None:
    environment = {
        "AUTH": "maybe",
        "DEVICE": "mps",
        "LEASE_SECONDS": "0",
        "DATABASE_URL": "mysql://ann:secret@host/db",
    }
    result = timetuner(*command.split(), TIMETUNER_HOME=str(tmp_path / "home"), **environment)
    accepted = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    assert result.err.splitlines() == [
        f"timetuner: DATABASE_URL is 'mysql://***@host/db'; accepted: {accepted}",
        "timetuner: AUTH is 'maybe'; accepted: 'auto', 'on' or 'off'",
        "timetuner: DEVICE is 'mps'; accepted: auto, cpu, cuda, cuda:0, cuda:1, ...",
        "timetuner: LEASE_SECONDS is '0'; accepted: greater than 0",
    ]
    assert (result.code, result.out) == (2, "")
