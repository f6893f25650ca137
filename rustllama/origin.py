"""Web origins: the scheme, host and port that a browser tells a server, parsed so that they can be compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_LABEL = r"[a-z0-9_-]+"
_ORIGIN = re.compile(
    rf"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|{_LABEL}(?:\.{_LABEL})*\.?|)(?::(\d{{1,5}}))?", re.ASCII | re.IGNORECASE
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


@dataclass(frozen=True, slots=True)
class Origin:
    """Equal to another one where browsers hold both for the same (RFC 6454, sections 4 and 5)."""

    scheme: str
    host: str  # as `normal_host` writes it
    port: int | None  # None: the scheme's own

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Of `https://chat.example.com`, `http://[::1]:3000`, `chrome-extension://abcdef`. Raises ValueError."""
        found = _ORIGIN.fullmatch(text)
        scheme = found[1].lower() if found else ""
        if not found or (scheme in _DEFAULT_PORTS and not found[2]):
            raise ValueError("an origin like https://chat.example.com, without a path")
        port = int(found[3]) if found[3] else None
        return cls(scheme, normal_host(found[2]), None if port == _DEFAULT_PORTS.get(scheme) else port)

    @property
    def address(self) -> IPv4Address | IPv6Address | None:
        """None for a name."""
        return _address(self.host)

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine for whoever says it; names below `.localhost` are (RFC 6761)."""
    address = _address(host)
    if address is None:
        return f".{host}".endswith(".localhost")
    return any(address in network for network in _LOOPBACK)


def normal_host(host: str) -> str:
    """The one way to write a host: lower case, no root dot; an IPv6 address at its shortest, without brackets."""
    host = host.strip("[]")
    address = _address(host)
    return host.lower().removesuffix(".") if address is None else str(address)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
