"""The client that a trusted proxy names in a header: X-Forwarded-For, Forwarded (RFC 7239) or X-Real-IP.

uvicorn's middleware knows the first. This one puts what the others say into its terms.
"""

import re
from collections.abc import Sequence
from typing import TypeAlias

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.access.local import is_loopback

# RFC 7239, section 4: elements are apart by commas, and the pairs of an element by semicolons. A pair is a token and a
# token or a quoted string, which may hold commas and semicolons. There may be white space around both.
WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
QUOTED = r'"(?:[^"\\]|\\.)*"'
PAIR = re.compile(rf"({WORD})=({WORD}|{QUOTED})")
PIECES = {separator: re.compile(rf'{QUOTED}|[^"{separator}]+|{separator}') for separator in ",;"}
NODE = re.compile(r"[0-9A-Za-z._:\[\]-]+")
UNKNOWN = "unknown"  # RFC 7239's word for a client that is not named. It is no address of this machine.

Element: TypeAlias = dict[str, str]


class ForwardedMiddleware(ProxyHeadersMiddleware):
    """Sets a request's client and scheme by the headers of trusted proxies. Other peers' headers are ignored.

    Where several headers name clients, X-Forwarded-For goes before Forwarded, and that before X-Real-IP. But an address
    of this machine never goes before another: proxies pass on headers that they do not set, so that a client elsewhere
    could name this machine in one of them.
    """

    def __init__(self, app: ASGIApp, trusted_hosts: list[str] | str) -> None:
        super().__init__(app, trusted_hosts)  # type: ignore[arg-type]  # uvicorn has ASGI's types anew.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        client = scope.get("client")
        if scope["type"] == "http" and client is not None and client[0] in self.trusted_hosts:
            scope = dict(scope, headers=list(scope["headers"]))
            self._translate(MutableHeaders(scope=scope))
        await super().__call__(scope, receive, send)  # type: ignore[arg-type]

    def _translate(self, headers: MutableHeaders) -> None:
        """Leave the client that is meant as the one of X-Forwarded-For, and its scheme as that of X-Forwarded-Proto."""
        named: list[tuple[str, str | None]] = []  # Each header's client, and the scheme that it used.
        if x_forwarded_for := _all_of(headers, "x-forwarded-for"):
            named.append((self._host(x_forwarded_for), None))
        if (elements := _elements(_all_of(headers, "forwarded"))) and (node := self._outermost(elements)):
            named.append((self._host(node["for"]), node.get("proto")))
        if x_real_ip := headers.getlist("x-real-ip"):
            named.append((self._host(_node(x_real_ip[-1].strip())), None))
        if not named:
            return
        host, scheme = next((each for each in named if not is_loopback(each[0])), named[0])
        if host != named[0][0] or not x_forwarded_for:
            headers["x-forwarded-for"] = f"[{host}]" if ":" in host else host
        if scheme is not None and "x-forwarded-proto" not in headers:
            headers["x-forwarded-proto"] = scheme

    def _outermost(self, elements: Sequence[Element]) -> Element | None:
        """The element of the first hop, seen from here, that is no trusted proxy; of the first one, if all are."""
        named = [element for element in elements if "for" in element]
        strangers = [element for element in named if self._host(element["for"]) not in self.trusted_hosts]
        if self.trusted_hosts.always_trust or not strangers:
            return next(iter(named), None)
        return strangers[-1]

    def _host(self, x_forwarded_for: str) -> str:
        return self.trusted_hosts.get_trusted_client_address(x_forwarded_for)[0]


def _all_of(headers: Headers, name: str) -> str:
    """The values of all headers of a name, as one list."""
    return ", ".join(headers.getlist(name))


def _elements(forwarded: str) -> list[Element]:
    """The elements of a Forwarded header. One that cannot be read is from an unknown client, as are all before it."""
    parts = _split(forwarded, ",")
    if parts is None:
        return [{"for": UNKNOWN}]
    elements: list[Element] = []
    for part in filter(None, parts):
        pairs = [PAIR.fullmatch(pair) for pair in _split(part, ";") or () if pair]
        element = {pair[1].lower(): _unquoted(pair[2]) for pair in pairs if pair is not None}
        if None in pairs:
            elements, element = [], {"for": UNKNOWN}
        elif "for" in element:
            element["for"] = _node(element["for"])
        elements.append(element)
    return elements


def _split(text: str, separator: str) -> list[str] | None:
    """The parts between separators that are in no quoted string; None if a quotation mark has no partner.

    It is one pass: clients elsewhere may send what they like.
    """
    parts, position = [""], 0
    while position < len(text):
        piece = PIECES[separator].match(text, position)
        if piece is None:
            return None
        if piece[0] == separator:
            parts.append("")
        else:
            parts[-1] += piece[0]
        position = piece.end()
    return [part.strip() for part in parts]


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value


def _node(text: str) -> str:
    """An address with or without a port, or a name; `UNKNOWN` for what is neither."""
    return text if NODE.fullmatch(text) else UNKNOWN
