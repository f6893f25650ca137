"""TLS: the server's certificate, and the handshake with each client."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gevent
from gevent.socket import socket as Socket
from gevent.ssl import SSLContext, SSLSocket

from rustllama.errors import SettingError
from rustllama.settings import Settings

HANDSHAKE_S = 10.0
_FIRST_BYTE = b"\x16"  # of a TLS handshake, RFC 8446, 5.1
_BODY = b'{"error":"This server speaks TLS: use https:// in the place of http://."}\n'
_PLAIN_REFUSAL = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    % len(_BODY)
    + _BODY
)


def server_context(settings: Settings) -> SSLContext | None:
    """None where no certificate is set. Raises SettingError for files that are not there, or are no pair."""
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None:
        if key is not None:
            raise SettingError(f"RUSTLLAMA_TLS_KEY={key} is of no use without RUSTLLAMA_TLS_CERT: set both, or none.")
        return None
    _check_readable("RUSTLLAMA_TLS_CERT", cert)
    if key is not None:
        _check_readable("RUSTLLAMA_TLS_KEY", key)
    context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # or OpenSSL asks for one at the terminal
    except (ssl.SSLError, ValueError) as error:
        raise SettingError(
            f"RUSTLLAMA_TLS_CERT={cert} and RUSTLLAMA_TLS_KEY={key or ''} are no PEM certificate and its key without a "
            f"password: {getattr(error, 'reason', None) or error}."
        ) from None
    return context


def _check_readable(variable: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise SettingError(
            f"{variable}={path} cannot be read: {error.strerror}; name a PEM file that this user can read."
        ) from None


def shake_hands(
    client: Socket, context: SSLContext, refused: Callable[[str], None], timeout_s: float = HANDSHAKE_S
) -> SSLSocket | None:
    """The connection above TLS, called in its greenlet. None, and a closed one, where a stranger does not speak TLS, or
    nothing in time: that is no fault of ours, and only `refused` is told why.
    """
    why = "it does not speak TLS"
    try:
        with gevent.Timeout(timeout_s):
            if client.recv(1, socket.MSG_PEEK) == _FIRST_BYTE:
                client = context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
                client.do_handshake()
                return client
            client.sendall(_PLAIN_REFUSAL)
            client.shutdown(socket.SHUT_WR)
            client.recv(1 << 20)  # or the answer is lost with what was sent and not read
    except (OSError, gevent.Timeout) as error:
        why = getattr(error, "reason", None) or type(error).__name__
    refused(why)
    with suppress(OSError):
        client.close()
    return None
