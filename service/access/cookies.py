"""API keys of browsers: a cookie holds the key for the web page. Scripts cannot read it."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from service.http.errors import ForbiddenError

COOKIE = "timetuner_key"
ACCEPTED = "requests that this service's own pages send"


def cookie_authorization(headers: Headers) -> str | None:
    """The Authorization header that a request's cookie stands for."""
    key = cookie_parser(headers.get("cookie", "")).get(COOKIE)
    return f"Bearer {key}" if key else None


def check_same_origin(headers: Headers) -> None:
    """CSRF check. Browsers attach the cookie to requests that other sites trigger, so refuse those.

    Raises: ForbiddenError.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        if site != "same-origin":
            raise ForbiddenError(
                f"Sec-Fetch-Site is {site!r}; accepted: {ACCEPTED}", ("header", "Sec-Fetch-Site"), site
            )
    elif origin is None or _host(origin) != headers.get("host"):
        raise ForbiddenError(f"Origin is {origin!r}; accepted: {ACCEPTED}", ("header", "Origin"), origin)


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None
