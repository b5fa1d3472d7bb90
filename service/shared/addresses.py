"""Network addresses that the service may connect to when a client names them."""

import ipaddress
from collections.abc import Iterable
from typing import TypeAlias

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# These IPv6 networks are translated to IPv4 addresses, which may be private ones.
TRANSLATED = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")]


def is_allowed(address: Address, networks: Iterable[Network]) -> bool:
    """Whether the address is public, or in one of these networks."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return is_allowed(address.ipv4_mapped, networks)
    if any(address in network for network in networks):
        return True
    translated = any(address in network for network in TRANSLATED)
    return address.is_global and not address.is_multicast and not translated
