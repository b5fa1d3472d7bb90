"""The address of `timetuner up`, announced to commands of the same home by a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

FILE = "url"
ANSWER_SECONDS = 5.0


@contextmanager
def announced(home: Path, url: str) -> Iterator[None]:
    """Announce the URL until the context ends. If a home has two services, the later one is announced."""
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
    except (OSError, ValueError):  # No service has told its URL.
        return None
    return url if fetch(f"{url}/healthz")[0] == HTTPStatus.OK else None


def fetch(url: str) -> tuple[int, str]:
    """The status and the body of a GET of this URL; 0 if nobody answers. No proxy is asked.

    The standard library is imported faster than httpx.
    """
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=ANSWER_SECONDS) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:  # The status is 400 or more.
        with error:
            return error.code, error.read().decode(errors="replace")
    except (OSError, ValueError, HTTPException):
        return 0, ""
