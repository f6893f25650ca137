"""How many connections there are, in all and of one client; what is too much is refused."""

from __future__ import annotations

import logging
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rustllama.addresses import Proxies, client_key, is_local
from rustllama.errors import Busy, TooManyRequests

_SPARE_FILES = 256  # the registry, pipes, event loops, and connections that are just being refused
_log = logging.getLogger("rustllama.serve")


class Connections:
    """Of one process; what is counted is given back when its `with` ends."""

    def __init__(self, most: int, most_per_client: int, proxies: Proxies) -> None:
        """`most_per_client` 0 is no limit."""
        self.open = 0
        self.of_client: Counter[str] = Counter()
        self._most = most
        self._most_per_client = most_per_client
        self._proxies = proxies

    @contextmanager
    def opened(self, peer: str) -> Iterator[None]:
        """Counts a connection. Raises Busy, or TooManyRequests where one client has too many."""
        if self.open >= self._most:
            raise Busy(
                f"All {self._most} connections of this server are taken: try again soon, or raise "
                "RUSTLLAMA_MAX_CONNECTIONS at the server."
            )
        self.open += 1
        try:
            if peer in self._proxies:
                yield
            else:
                with self._counted(peer):
                    yield
        finally:
            self.open -= 1

    @contextmanager
    def asked(self, peer: str, forwarded: str) -> Iterator[str]:
        """The address of the client that a request comes from; those of a proxy count for their clients.

        `forwarded` is X-Forwarded-For. Raises TooManyRequests.
        """
        if peer not in self._proxies:
            yield peer
            return
        client = self._proxies.client(peer, forwarded)
        with self._counted(client):
            yield client

    @contextmanager
    def _counted(self, client: str) -> Iterator[None]:
        if not self._most_per_client or is_local(client):
            yield
            return
        key = client_key(client)
        if self.of_client[key] >= self._most_per_client:
            raise TooManyRequests(
                f"Your address has {self._most_per_client} connections or requests open: end some, or raise "
                "RUSTLLAMA_MAX_CONNECTIONS_PER_CLIENT at the server."
            )
        self.of_client[key] += 1
        try:
            yield
        finally:
            self.of_client[key] -= 1
            if not self.of_client[key]:
                del self.of_client[key]


class Refusals:
    """Strangers may be refused thousands of times a second: they are counted by the reason, and told in one line."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, reason: str) -> None:
        """`reason` is one of few, and none of a client's own words."""
        self._counts[reason] += 1

    def tell(self) -> None:
        """Logs what was noted since the last time, if anything."""
        if self._counts:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self._counts.most_common())
            _log.info("refused %d connections or requests: %s", self._counts.total(), reasons)
            self._counts.clear()


def affordable(wanted: int) -> int:
    """As many of these connections as this process may have open files; raises its limit as far as it can and must."""
    needed = wanted + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError):  # macOS has a limit of its own below the hard one
        limit = soft
    most = max(1, min(wanted, limit - _SPARE_FILES))
    if most < wanted:
        _log.warning("only %d connections, as this process may open %d files: raise that limit", most, limit)
    return most
