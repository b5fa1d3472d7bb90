"""Protection while no key is needed: only this machine is served, and no other site through its browsers.

A page of any site can have its visitor's browser send requests to 127.0.0.1. It cannot read the answers, nor send JSON,
unless its own name leads to 127.0.0.1 (DNS rebinding): then the Host header has that name. But forms may be sent
anywhere, and one could upload a model: then the Origin header has the page's site.
"""

from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from service.http.errors import ForbiddenError

ACCEPTED = "this machine, by 127.0.0.1, localhost or [::1], while no API key is needed"


def check_local(scope: Scope, headers: Headers) -> None:
    """Refuse requests from other machines or other sites. Raises: ForbiddenError."""
    client = scope.get("client")  # Requests over a Unix socket have no client address.
    if client is not None and not is_loopback(client[0]):
        raise ForbiddenError(f"this request is from {client[0]}; accepted: {ACCEPTED}")
    host, origin = headers.get("host", ""), headers.get("origin")
    if not _is_here(f"//{host}"):
        raise ForbiddenError(f"Host is {host!r}; accepted: {ACCEPTED}", ("header", "Host"), host)
    if origin is not None and not _is_here(origin):
        raise ForbiddenError(f"Origin is {origin!r}; accepted: {ACCEPTED}", ("header", "Origin"), origin)


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own and cannot be reached from others."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@lru_cache(maxsize=64)
def _is_here(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
