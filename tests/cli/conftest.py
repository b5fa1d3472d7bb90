"""The `timetuner` command as its users have it."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from service.cli import main
from tests.stack import Stack

COMMAND = [sys.executable, "-m", "service"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run: TypeAlias = Callable[..., Result]


@pytest.fixture
def timetuner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`timetuner(*arguments, **environment)`, in this process."""

    def run(*arguments: str, **environment: str) -> Result:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["timetuner", *arguments])
            for name, value in environment.items():
                patched.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
        out, err = capsys.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def environment(stack: Stack, tmp_path: Path) -> dict[str, str]:
    """The environment of a command that is to use the deployment."""
    return os.environ | {"TIMETUNER_URL": str(stack.client.base_url), "TIMETUNER_HOME": str(tmp_path), "COLUMNS": "200"}


@pytest.fixture
def connected(timetuner: Run, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same, in an empty folder and with the deployment's URL."""
    monkeypatch.chdir(tmp_path)
    own = ("TIMETUNER_URL", "TIMETUNER_HOME")

    def run(*arguments: str, **more: str) -> Result:
        return timetuner(*arguments, **{name: environment[name] for name in own} | more)

    return run
