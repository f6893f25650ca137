"""The socket of one client: how long it may take to send its requests, and to take its answers."""

from __future__ import annotations

import contextlib
import enum
import math
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from rustllama.errors import Cancelled, TooSlow

_LINGER_S = 0.5
_LINGER_BYTES = 1 << 20
_RECEIVE_BYTES = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER for no time: what was not sent is dropped


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds; `math.inf` is no limit."""

    head_s: float
    body_s: float
    write_s: float
    idle_s: float  # between an answer and the next request


class _Phase(enum.Enum):
    IDLE = "idle"  # nothing of the next request has come
    HEAD = "head"
    BODY = "body"


class ClientSocket:
    """What Gunicorn reads requests from and writes answers to, in the place of gevent's socket.

    All bytes of a head or a body have one deadline together, however they trickle; only a body of which the
    application says that it is large may take any time, as long as it keeps coming. Nothing is limited while an answer
    is being made, nor while the client takes it.
    """

    def __init__(self, raw: socket.socket, patience: Patience) -> None:
        self._raw = raw
        self._patience = patience
        self._phase = _Phase.HEAD
        self._silent = True  # nothing was received yet: there is nobody to answer
        self._deadline_s = time.monotonic() + patience.head_s
        self._when_late: Callable[[], None] = lambda: None
        self._gone = False
        self._unhurried = False

    def expect_body(self, when_late: Callable[[], None]) -> None:
        """The head is complete. `when_late` is called before TooSlow is raised in whoever reads the body."""
        self._enter(_Phase.BODY, self._patience.body_s)
        self._when_late = when_late

    def expect_large_body(self) -> None:
        """For the rest of this body the limit is one on silence."""
        self._unhurried = self._phase is _Phase.BODY

    def expect_request(self) -> None:
        """The body is read and the answer is sent."""
        self._enter(_Phase.IDLE, self._patience.idle_s)

    def recv(self, size: int) -> bytes:
        """As of a socket; a client that was idle too long has ended its stream. Raises TooSlow."""
        left_s = self._patience.body_s if self._unhurried else self._deadline_s - time.monotonic()
        try:
            if left_s <= 0:
                return self._late()
            self._raw.settimeout(_timeout(left_s))
            data = self._raw.recv(size)
        except TimeoutError:
            return self._late()
        self._silent = False
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD, self._patience.head_s)
        return data

    def sendall(self, data: bytes) -> None:
        """Raises Cancelled when the client takes nothing for too long; its connection is then reset."""
        self._raw.settimeout(_timeout(self._patience.write_s))
        left = memoryview(data)
        try:
            while left:
                left = left[self._raw.send(left) :]
        except TimeoutError:
            self._gone = True
            self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            raise Cancelled from None

    def send(self, data: bytes) -> int:
        self.sendall(data)
        return len(data)

    def fileno(self) -> int:
        return self._raw.fileno()

    def setblocking(self, _flag: bool) -> None:
        """Gunicorn's; here every wait has its own limit."""

    def shutdown(self, how: int) -> None:
        self._raw.shutdown(how)

    def close(self) -> None:
        """Waits a moment for the client to do the same, or it may never see what it was sent (RFC 9112, 9.6)."""
        if not self._gone:
            self._gone = True
            with contextlib.suppress(OSError):
                self._linger()
        self._raw.close()

    def hurry(self) -> None:
        """Makes `close` wait for nothing."""
        self._gone = True

    def _linger(self) -> None:
        self._raw.shutdown(socket.SHUT_WR)
        deadline_s, received = time.monotonic() + _LINGER_S, 0
        while received < _LINGER_BYTES and (left_s := deadline_s - time.monotonic()) > 0:
            self._raw.settimeout(left_s)
            data = self._raw.recv(_RECEIVE_BYTES)
            if not data:
                return
            received += len(data)

    def _enter(self, phase: _Phase, patience_s: float) -> None:
        self._phase = phase
        self._unhurried = False
        self._deadline_s = time.monotonic() + patience_s

    def _late(self) -> bytes:
        if self._silent or self._phase is _Phase.IDLE:
            return b""
        self._when_late()
        what = self._phase.value
        limit_s = self._patience.head_s if self._phase is _Phase.HEAD else self._patience.body_s
        how = "stopped coming for" if self._unhurried else "took longer than"
        raise TooSlow(
            f"The {what} of the request {how} {limit_s:g} s: send it faster, or raise RUSTLLAMA_{what.upper()}_TIMEOUT "
            "at the server."
        )


def _timeout(patience_s: float) -> float | None:
    return None if patience_s == math.inf else patience_s
