"""The `timetuner` command as its users have it."""

import os
import subprocess
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
    """Of a command that is to use the deployment."""
    return os.environ | {"TIMETUNER_URL": str(stack.client.base_url), "TIMETUNER_HOME": str(tmp_path), "COLUMNS": "200"}


@pytest.fixture
def process(environment: dict[str, str], tmp_path: Path) -> Run:
    """`process(*arguments, **environment)`: the same as a process of its own, in an empty folder."""

    def run(*arguments: str, **own: str) -> Result:
        done = subprocess.run(
            [*COMMAND, *arguments], env=environment | own, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run
