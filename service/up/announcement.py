"""Where `timetuner up` answers, told to the commands of the same home by a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

FILE = "url"
ANSWER_SECONDS = 5.0


@contextmanager
def announced(home: Path, url: str) -> Iterator[None]:
    """Tell the URL until the end; of two services of a home, the later one is told."""
    file = home / FILE
    home.mkdir(parents=True, exist_ok=True)
    file.write_text(url)
    try:
        yield
    finally:
        if file.is_file() and file.read_text() == url:
            file.unlink()


def running_url(home: Path) -> str | None:
    """The URL of the home's service, if it answers."""
    try:
        url = (home / FILE).read_text()
    except (OSError, ValueError):  # None was told.
        return None
    return url if answers(f"{url}/healthz") else None


def answers(url: str) -> bool:
    """Whether a GET of this URL succeeds; no proxy is asked. `urllib` is there at once, an HTTP client is not."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=ANSWER_SECONDS):
            return True
    except (OSError, ValueError, HTTPException):  # Nobody answers, or with a status of 400 or more.
        return False
