"""Plays HTTP requests in one thread and writes down which bytes came when; what they mean is read after the run.

The load generator shares its cores with the server under test, so a token may cost it next to nothing: a `select`, a
`recv`, a look at the clock, an `append`. Every request asks for `Connection: close`, so the end needs no parsing.
"""

from __future__ import annotations

import errno
import os
import random
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from rustllama.errors import ServerUnreachable

CONNECT_TIMEOUT_S = 10.0
SILENCE_LIMIT_S = 600.0
PIECE_BYTES = 4096  # a larger buffer costs more to allocate than a token does


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server was found: a host may have several addresses, and not all of them answer."""

    family: socket.AddressFamily
    place: tuple[str | int, ...]

    @classmethod
    def find(cls, host: str, port: int) -> Address:
        """Raises ServerUnreachable."""
        try:
            with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S) as found:
                return cls(socket.AddressFamily(found.family), found.getpeername())
        except OSError as error:
            raise ServerUnreachable(
                f"No server answers at {host}:{port} ({error}); start one with `rustllama serve`."
            ) from None


@dataclass(slots=True, eq=False)
class Recording:
    """A request, and the raw pieces that came back with the time of each."""

    request: bytes
    leaves_after: int | None = None  # pieces; then the client hangs up
    started_s: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None

    @property
    def left(self) -> bool:
        return self.leaves_after is not None and len(self.pieces) >= self.leaves_after


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests start: `concurrency` at a time, or by chance `rate` a second, however many run."""

    concurrency: int = 1
    rate: float | None = None
    seed: int = 0

    def waits_s(self, count: int) -> list[float]:
        """From the start of the run to each request, in order; 0: as soon as fewer than `concurrency` run."""
        if self.rate is None:
            return [0.0] * count
        chance, waits, at_s = random.Random(self.seed), list[float](), 0.0
        for _ in range(count):
            waits.append(at_s)
            at_s += chance.expovariate(self.rate)
        return waits


class Player:
    """Plays recordings against one address. Use it for one run."""

    def __init__(self, address: Address, silence_limit_s: float = SILENCE_LIMIT_S) -> None:
        self._address = address
        self._silence_limit_s = silence_limit_s
        self._selector = selectors.DefaultSelector()
        self._live: dict[Recording, socket.socket] = {}
        self._unsent: dict[Recording, memoryview] = {}

    def play(self, recordings: Iterable[Recording], arrivals: Arrivals, intruder: Recording | None = None) -> None:
        """Fills the recordings. The intruder starts once every other one has got its first piece."""
        played = list(recordings)
        began_s = time.perf_counter()
        waiting = deque(zip(arrivals.waits_s(len(played)), played, strict=True))
        limit = len(played) if arrivals.rate else arrivals.concurrency
        with self._selector:
            while waiting or self._live:
                while waiting and len(self._live) < limit and time.perf_counter() - began_s >= waiting[0][0]:
                    self._start(waiting.popleft()[1])
                if intruder and all(recording.pieces or recording.failure for recording in played):
                    self._start(intruder)
                    intruder = None
                due = waiting and len(self._live) < limit
                self._wait(max(0.0, began_s + waiting[0][0] - time.perf_counter()) if due else None)

    def _wait(self, until_due_s: float | None) -> None:
        ready = self._selector.select(self._silence_limit_s if until_due_s is None else until_due_s)
        for key, events in ready:
            if events & selectors.EVENT_WRITE:
                self._send(key.data)
            else:
                self._receive(key.data)
        if not ready and until_due_s is None:
            for recording in list(self._live):
                self._end(recording, f"no byte came for {self._silence_limit_s:g} s")

    def _start(self, recording: Recording) -> None:
        recording.started_s = time.perf_counter()
        connection = socket.socket(self._address.family, socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._live[recording] = connection
        self._unsent[recording] = memoryview(recording.request)
        self._selector.register(connection, selectors.EVENT_WRITE, recording)
        code = connection.connect_ex(self._address.place)
        if code not in (0, errno.EINPROGRESS):
            self._end(recording, os.strerror(code))

    def _send(self, recording: Recording) -> None:
        connection, unsent = self._live[recording], self._unsent[recording]
        try:
            unsent = unsent[connection.send(unsent) :]
        except OSError as error:
            self._end(recording, str(error))
            return
        self._unsent[recording] = unsent
        if not unsent:
            self._selector.modify(connection, selectors.EVENT_READ, recording)

    def _receive(self, recording: Recording) -> None:
        try:
            piece = self._live[recording].recv(PIECE_BYTES)
        except OSError as error:
            self._end(recording, str(error))
            return
        if not piece:
            self._end(recording)
            return
        recording.pieces.append((time.perf_counter(), piece))
        if recording.left:
            self._end(recording)

    def _end(self, recording: Recording, failure: str | None = None) -> None:
        recording.failure = failure
        connection = self._live.pop(recording)
        del self._unsent[recording]
        self._selector.unregister(connection)
        connection.close()
