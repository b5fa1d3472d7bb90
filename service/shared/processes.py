"""How processes of ours are started, whatever folder they are started in."""

import sys


def python(*arguments: str) -> list[str]:
    """Python without the current folder on its path, so that a user's `worker.py` there is not imported as ours."""
    return [sys.executable, "-P", *arguments]


def timetuner(*arguments: str) -> list[str]:
    """The command line of a `timetuner` command."""
    return python("-m", "timetuner", *arguments)
