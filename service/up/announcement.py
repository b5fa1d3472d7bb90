"""The address of `timetuner up`, announced to commands of the same home by a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

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
        return url if httpx.get(f"{url}/healthz", timeout=ANSWER_SECONDS, trust_env=False).is_success else None
    except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL):  # No service runs, or it was killed.
        return None
