"""uvicorn's HTTP protocol, with limits on the size of a request's headers and on the time they may take.

A body's size and time are bounded by `body_limit`, the time between requests by uvicorn itself.
"""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http.errors import problem_response

MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 * 1024  # The request's target counts, too.
# A request's headers must be complete this long after the connection began or, for later requests, its first byte came.
HEADER_SECONDS = 10.0
# The rest of a body may take this long if its request was answered before the body was read.
LINGER_SECONDS = 5.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. A request beyond a bound is answered with a problem, and the connection closed."""

    _in_headers = True  # False once all headers of the current request were received.
    _progress = 0  # The number of events that the parser has reported.
    _pending_bytes = 0  # Bytes received since the parser's last event.
    _too_large = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_headers and self._timer is None:
            self._start_timer(HEADER_SECONDS)
        before = self._progress
        super().data_received(data)
        self._pending_bytes = self._pending_bytes + len(data) if self._progress == before else 0
        if self._pending_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_headers:
            return  # Trailers after a chunked body are ignored.
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._stop_parsing()

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise ValueError("another version")
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self._stop_parsing()
        self._stop_timer()
        self._progress += 1
        self._in_headers = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._progress += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._progress += 1
        self._in_headers = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_headers and not self.transport.is_closing():
            self._start_timer(LINGER_SECONDS)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that the parser refused. uvicorn calls this."""
        if self._too_large:
            self._refuse_headers()
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request cannot be read; accepted: HTTP/1.1 as RFC 9112 has it")

    def _stop_parsing(self) -> None:
        self._too_large = True
        raise ValueError("too large headers")

    def _refuse_headers(self) -> None:
        accepted = f"up to {MAX_HEADERS} headers, and {MAX_HEADER_BYTES} bytes with the request's target"
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        self._refuse(status, f"the request's headers are too large; accepted: {accepted}")

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Answer, unless the answer to an earlier request is on its way, and hang up."""
        self._stop_timer()
        if self.cycle is None or self.cycle.response_complete:
            response = problem_response(status, detail)
            head = [f"HTTP/1.1 {status.value} {status.phrase}".encode(), b"connection: close"]
            head += [name + b": " + value for name, value in response.raw_headers]
            self.transport.write(b"\r\n".join([*head, b"", bytes(response.body)]))
        self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if self._in_headers:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"no whole request came within {HEADER_SECONDS:.0f} s")
        else:
            self.transport.close()
