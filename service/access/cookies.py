"""API keys that browsers keep for the web page, in a cookie that no script reads and no other site sends."""

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
    """Refuse what another site has a browser send: it sends the cookie unasked. Raises: ForbiddenError."""
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
