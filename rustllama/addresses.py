"""What an IP address tells: whether it is this machine's, who counts as one client, and who asks through a proxy."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from rustllama.settings import Network

_NAT64 = IPv6Network("64:ff9b::/96")
_SUBNET_BITS = 64  # of IPv6: what one line gets, and may fill with addresses as it likes


def parse_ip(text: str) -> IPv4Address | IPv6Address | None:
    """None for what is not an address. IPv4 in the dress of IPv6 is IPv4."""
    try:
        found = ip_address(text.strip())
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


def is_local(text: str) -> bool:
    """Whether it is the loopback of this machine; what is not an address is not."""
    found = parse_ip(text)
    return found is not None and found.is_loopback


def is_public(text: str) -> bool:
    """Whether it is of the open Internet, also where it carries an IPv4 address (6to4, NAT64) within."""
    found = parse_ip(text)
    if isinstance(found, IPv6Address):
        within = IPv4Address(int(found) & 0xFFFFFFFF) if found in _NAT64 else found.sixtofour
        if within is not None:
            found = within
    return found is not None and found.is_global and not found.is_multicast


def client_key(text: str) -> str:
    """The same for all addresses that one client may have at once."""
    found = parse_ip(text)
    if not isinstance(found, IPv6Address):
        return text if found is None else str(found)
    return str(IPv6Address(int(found) >> _SUBNET_BITS << _SUBNET_BITS))


@dataclass(frozen=True, slots=True)
class Proxies:
    """The machines that may say for whom they ask."""

    networks: tuple[Network, ...] = ()

    def __contains__(self, text: str) -> bool:
        found = parse_ip(text) if self.networks else None
        return found is not None and any(found in network for network in self.networks)

    def client(self, peer: str, forwarded: str) -> str:
        """The address of who asks: `peer`, or as far back in X-Forwarded-For as proxies vouch for it.

        Each proxy appends who asked it, so only what is right of the first stranger was written by proxies.
        """
        client = peer
        for hop in reversed(forwarded.split(",")):
            found = parse_ip(hop)
            if found is None or client not in self:
                break
            client = str(found)
        return client
