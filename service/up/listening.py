"""The sockets that the API listens on."""

import errno
import socket

BACKLOG = 2048  # Connections that may wait, as uvicorn has it.


class AddressError(Exception):
    """An address that cannot be listened on: which, why, and what is accepted."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Listen on each address of a host. Connections wait until a process accepts them.

    Raises: AddressError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise AddressError(f"--host is {host!r}; accepted: an address or a name of this machine") from None
    sockets: list[socket.socket] = []
    refusal: OSError | None = None
    for family, address in dict.fromkeys((family, address[:2]) for family, _, _, _, address in found):
        try:
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError as error:
            # A name may have an address of a family that this machine does without.
            if refusal is None or error.errno != errno.EADDRNOTAVAIL:
                refusal = error
    if refusal is not None and (not sockets or refusal.errno != errno.EADDRNOTAVAIL):
        for each in sockets:
            each.close()
        if refusal.errno == errno.EADDRINUSE:
            raise AddressError(f"--port is {port}, on which another program listens; accepted: a free port")
        reason = (refusal.strerror or str(refusal)).lower()
        accepted = "an address of this machine, and a port that may be listened on"
        raise AddressError(f"{url_of(host, port)} cannot be listened on: {reason}; accepted: {accepted}")
    return sockets


def url_of(host: str, port: int) -> str:
    """The URL of a service on this address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
