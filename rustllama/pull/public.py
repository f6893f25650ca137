"""Connections to public addresses alone: looked at once they are resolved, and then connected to as they were.

A server that others may use would else fetch for them from its own machine and network ("server-side request forgery").
"""

from __future__ import annotations

import socket
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError

from rustllama.addresses import is_public
from rustllama.errors import SourceRefused


def check_public(host: str, port: int) -> list[str]:
    """The addresses of `host`. Raises SourceRefused where one is not public, and OSError for a name that is none."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(map(is_public, found)):
        raise SourceRefused(
            f"{host} is in a private network, from which a server that others can reach takes nothing: name a public "
            "source, or pull at a server on loopback.",
            "model",
        )
    return found


def _connected(connection: HTTPConnection) -> socket.socket:
    failure: Exception = OSError("no address")
    timeout: Any = connection.timeout
    try:
        for address in check_public(connection.host, connection.port):
            try:
                return socket.create_connection((address, connection.port), timeout)
            except OSError as error:
                failure = error
    except OSError as error:
        failure = error
    raise NewConnectionError(connection, str(failure))


class _Plain(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _connected(self)


class _Secure(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _connected(self)


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _Secure


class PublicAdapter(HTTPAdapter):
    """For a session of requests. A proxy connects for itself: who uses one checks before."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}
