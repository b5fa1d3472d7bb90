"""All that the documentation shows is run.

The README is run from top to bottom; of other pages, the Python in one process, and the shell lines in one shell.

A block after the comment `<!-- not run: why -->` is only looked at: its syntax, and the names in it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import forked
from tests.conftest import StartStack
from tests.stack import Stack, free_port

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n+)?```(?P<language>\S*)\n(?P<text>.*?)^```$", re.M | re.S)
PARSERS: dict[str, Callable[[str], Any]] = {
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
}
RUN = ("python", "sh")
SHOWN = ("text", "bib", *PARSERS)
OPTIONS = re.compile(r"^::: .*\n(?: {4}.*\n)*", re.M)  # These lines are options of mkdocstrings.
SHOWN_URL = "http://127.0.0.1:8000"
GROUPS = ("db", "jobs", "keys", "models", "schedules")  # commands that have commands
PAGE_SECONDS = 800  # a minute or less, unless the machine does much else
# Efforts that pages show, and what is enough to see that their lines run.
LEAST_TUNER = '"total_iters": 2, "population_size": 16, "teacher_num_steps": 10'
LEAST_EVALUATION = '"num_samples": 16, "max_num_samples": 16, "teacher_num_steps": 10'
# The schedule is accepted, which those lines need that sample by `auto` or give it to a pipeline. Ten iterations of
# Adam are not nearer to the teacher than the best named grid, beyond chance, and one of the solver's is.
ACCEPTED_TUNER = '"objective": "solver", "total_iters": 1, "population_size": 48, "teacher_num_steps": 10'
ACCEPTED_EVALUATION = '"num_samples": 64, "teacher_num_steps": 20'
LESS_WORK = {
    "total_iters=20": "total_iters=10",
    '"tuner": {"total_iters": 20}': f'"tuner": {{{LEAST_TUNER}}}',
    '"evaluation": {"num_samples": 64, "teacher_num_steps": 50}': f'"evaluation": {{{LEAST_EVALUATION}}}',
    '"tuner": {"total_iters": 40}': f'"tuner": {{{ACCEPTED_TUNER}}}',
    '"evaluation": {"num_samples": 128, "teacher_num_steps": 50}': f'"evaluation": {{{ACCEPTED_EVALUATION}}}',
    'tuner={"total_iters": 40}, evaluation={"num_samples": 128}': (
        f"tuner={{{LEAST_TUNER}}}, evaluation={{{LEAST_EVALUATION}}}"
    ),
    'tuner={"objective": "dmn"})': f'tuner={{"objective": "dmn"}}, evaluation={{{LEAST_EVALUATION}}})',
}
# Of the README's three tuning jobs, only the last, in Python, must make a schedule that is accepted.
LESS_WORK_IN_THE_README = {
    **LESS_WORK,
    "total_iters=20": "total_iters=2",
    "torch.randn(64, 1, 8, 8)": "torch.randn(16, 1, 8, 8)",
    "torch.arange(64) % 10": "torch.arange(16) % 10",
    '"tuner": {"total_iters": 40}': f'"tuner": {{{LEAST_TUNER}}}',
    '"evaluation": {"num_samples": 128, "teacher_num_steps": 50}': f'"evaluation": {{{LEAST_EVALUATION}}}',
    "total_iters=40 --evaluation num_samples=128": (
        "total_iters=2 --tuner population_size=16 --tuner teacher_num_steps=10 "
        "--evaluation num_samples=16 --evaluation max_num_samples=16 --evaluation teacher_num_steps=10"
    ),
    'tuner={"total_iters": 40}, evaluation={"num_samples": 128}': (
        f"tuner={{{ACCEPTED_TUNER}}}, evaluation={{{ACCEPTED_EVALUATION}}}"
    ),
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    why: str | None  # it is not run

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["why"])
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
NOT_RUN = [block for block in BLOCKS if block.why is not None and block.language == "sh"]


def in_one_piece(page: Path, language: str) -> str:
    return "\n".join(block.text for block in blocks_of(page) if block.language == language and block.why is None)


def pages_with(language: str) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if in_one_piece(page, language)]


def others_with(language: str) -> list[Any]:
    """The pages but for the README, which is run from top to bottom."""
    return [page for page in pages_with(language) if page.values[0] != README]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a reader: the checkout's top, but for what is written there."""
    for name in ("benchmarks", "docs", "examples", "timetuner_core", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def with_our_packages(environment: dict[str, str]) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    packages = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return {**environment, "PATH": path, "PYTHONPATH": packages}


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Callable[[Path, str], str]:
    """A page's text in a language as it is run: with less work than it shows, except with `--all`."""

    def text(page: Path, language: str) -> str:
        whole = in_one_piece(page, language)
        if not request.config.getoption("--all"):
            for effort, less in LESS_WORK.items():
                whole = whole.replace(effort, less)
        return whole

    return text


def in_order(page: Path, url: str, less_work: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A page's blocks as language and text, in a reader's order. Python blocks side by side share a process."""
    blocks = [block for block in blocks_of(page) if block.language in RUN and block.why is None]
    for language, group in groupby(blocks, key=lambda block: block.language):
        text = "\n".join(block.text for block in group).replace(SHOWN_URL, url)
        for effort, less in less_work.items():
            assert effort in page.read_text() or effort in LESS_WORK, f"the page does not show {effort}"
            text = text.replace(effort, less)
        # The client's default is the port that `timetuner up` has unless another is named, as here.
        yield language, text.replace("TimeTuner()", f"TimeTuner({url!r})")


def uses_the_service(page: Path) -> bool:
    return "service.client" in in_one_piece(page, "python")


def run_python(page: Path, text: str, folder: Path, url: str) -> None:
    script = folder / f"{page.stem}.py"
    script.write_text(text.replace(SHOWN_URL, url))
    environment = with_our_packages({**os.environ, "OMP_NUM_THREADS": "1", "TIMETUNER_URL": url})
    done = forked.run([sys.executable, str(script)], environment, folder=folder, timeout=PAGE_SECONDS)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.timeout(PAGE_SECONDS + 100)
@pytest.mark.parametrize("page", [page for page in pages_with("python") if not uses_the_service(page.values[0])])
def test_the_python_of_a_page_runs(page: Path, folder: Path, shown: Callable[[Path, str], str]) -> None:
    run_python(page, shown(page, "python"), folder, "http://127.0.0.1:1")


@pytest.fixture(scope="module", params=["sqlite"])
def service(request: pytest.FixtureRequest, start_stack: StartStack) -> Iterator[Stack]:
    """One of our own, as the pages make keys."""
    stack = start_stack(request.param)
    stack.wait_until_ready()
    yield stack
    stack.stop()


@pytest.mark.timeout(PAGE_SECONDS + 100)
@pytest.mark.parametrize("page", [page for page in others_with("python") if uses_the_service(page.values[0])])
def test_the_python_of_a_page_runs_with_a_service(
    page: Path, folder: Path, shown: Callable[[Path, str], str], service: Stack
) -> None:
    run_python(page, shown(page, "python"), folder, str(service.client.base_url).rstrip("/"))


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("jq") is None, reason="needs curl and jq")
@pytest.mark.timeout(PAGE_SECONDS + 200)
@pytest.mark.xdist_group("README")
def test_the_readme_runs_from_top_to_bottom_with_no_variable_set(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each command follows those before it, in one shell, one folder and one home that was empty at first."""
    user = tmp_path / "user"
    user.mkdir()
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # PyTorch's threads are bounded for the sake of other tests. No variable of ours is set.
    environment = {"HOME": str(user), "PATH": programs, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    lines = ["set -euo pipefail", 'curl() { command curl --fail-with-body "$@"; }']
    less_work = {} if request.config.getoption("--all") else LESS_WORK_IN_THE_README
    for k, (language, text) in enumerate(in_order(README, url, less_work)):
        if language == "python":
            (folder / f"{k}.py").write_text(text)
        lines.append(f"python {k}.py" if language == "python" else text)
    with (folder / "log").open("wb") as log:
        up = ["timetuner", "up", "--port", port, "--tuning-workers", "1"]
        service = subprocess.Popen(up, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log)
        try:
            assert service.stdout is not None
            assert service.stdout.readline().startswith(b"TimeTuner is ready")
            script = ["bash", "-c", "\n".join(lines)]
            done = subprocess.run(
                script, cwd=folder, env=environment, capture_output=True, text=True, timeout=PAGE_SECONDS, check=False
            )
        finally:
            service.terminate()
            service.communicate()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{(folder / 'log').read_text()}"
    assert (folder / "timetuner-data" / "registry.sqlite").exists()
    messages = (folder / "log").read_text().splitlines()
    assert [line for line in messages if not line.startswith("timetuner: ")] == []
    assert list(user.iterdir()) == []


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("jq") is None, reason="needs curl and jq")
@pytest.mark.timeout(PAGE_SECONDS + 100)
@pytest.mark.parametrize("page", others_with("sh"))
def test_the_shell_lines_of_a_page_run(
    page: Path, folder: Path, shown: Callable[[Path, str], str], service: Stack
) -> None:
    url = str(service.client.base_url).rstrip("/")
    # curl alone would take an error's answer for a success.
    head = 'set -euo pipefail\ncurl() { command curl --fail-with-body "$@"; }\n'
    done = subprocess.run(
        ["bash", "-c", head + shown(page, "sh").replace(SHOWN_URL, url)],
        env=with_our_packages({**service.environment, "TIMETUNER_URL": url}),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PAGE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        assert block.language in RUN + SHOWN, block
        assert block.why is None or block.language in RUN, block
        PARSERS.get(block.language, str)(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_outside_a_block(page: Path) -> None:
    outside = OPTIONS.sub("", FENCE.sub("", page.read_text()))
    assert "```" not in outside
    assert not re.search(r"^    (?!\s*(?:[-*]|\d+\.) )\S", outside, re.MULTILINE)


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_a_block_that_is_not_run_names_what_there_is(block: Block) -> None:
    checked = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
    for line in block.text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if "=" not in word.partition("-")[0]]
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        match words:
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            case ["timetuner", command, *rest]:
                named = [command, *rest[:1]] if command in GROUPS else [command]
                known = help_of("-m", "service", *named)
                assert all(option in known for option in options), line
            case ["python", file, *_] if file.endswith(".py"):
                assert all(f'"{option}"' in (ROOT / file).read_text() for option in options), line


@cache
def help_of(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
