"""The names by which a client may call this server, so that no page's own name can be made to lead here."""

from __future__ import annotations

import socket
from ipaddress import ip_network

from rustllama.errors import Forbidden
from rustllama.origin import Origin, normal_host
from rustllama.settings import Settings

_PRIVATE = tuple(
    ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "100.64.0.0/10",  # shared: VPNs number their machines so
        "fc00::/7",
        "fe80::/10",
    )
)
_UNREGISTRABLE = (".local", ".internal", ".localhost")
_SHOWN_CHARACTERS = 80


class Hosts:
    """DNS rebinding: a page of evil.com asks evil.com, whose address has become ours; its `Host` still tells."""

    def __init__(self, settings: Settings, machine: str | None = None) -> None:
        """`machine` is this machine's name, by default what the system says."""
        name = normal_host(socket.gethostname() if machine is None else machine)
        bound = normal_host(settings.host[0])
        self._known = frozenset({bound, name, name.partition(".")[0], *settings.hosts})

    def check(self, header: str | None) -> None:
        """Raises Forbidden for a `Host` header that is none of ours, or missing."""
        if "*" in self._known or (header and self._is_ours(header)):
            return
        if not header:
            raise Forbidden(
                "The request names no host: send a 'Host' header that RUSTLLAMA_HOSTS at the server allows."
            )
        raise Forbidden(
            f"This server is not known as {header[:_SHOWN_CHARACTERS]!r}: use its own name or address, "
            "or add that host to RUSTLLAMA_HOSTS at the server."
        )

    def _is_ours(self, header: str) -> bool:
        try:
            url = Origin.parse(f"http://{header}")
        except ValueError:
            return False
        if url.host in self._known or url.is_loopback:
            return True
        address = url.address
        if address is None:
            return url.host.endswith(_UNREGISTRABLE)
        return any(address in network for network in _PRIVATE)
