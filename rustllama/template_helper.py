"""The helper process that runs strangers' chat templates, as its parent sees it.

A template is a program whose loops and texts grow as they like, and no thread of Python can be killed. The child
(`template_child`) bounds its memory; its time is bounded here, by killing it. It keeps what it compiled, so that only
messages travel.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from rustllama.core import Span
from rustllama.errors import InternalError, TemplateRefused, TemplateTooCostly
from rustllama.templates import Messages, TemplateSource

CHILD = (sys.executable, "-m", "rustllama.template_child")
DEADLINE_S = 2.0

_START_S = 60.0  # until it has imported what it needs, on a busy machine
_TRIES = 2  # a process that was killed, by the kernel for memory say, is no fault of the template
_SIZE_BYTES = 4
_MOST_FRAME_BYTES = 1 << 29
_log = logging.getLogger("rustllama.templates")

T = TypeVar("T")


class Order(msgspec.Struct, frozen=True):
    """What the child is sent."""

    key: bytes  # of the source
    conversations: Sequence[Sequence[Mapping[str, object]]]
    limit_bytes: int  # of each prompt
    deadline_s: float
    source: TemplateSource | None = None  # only where the child has asked for it


class Reply(msgspec.Struct, frozen=True):
    """What the child answers: one prompt for each conversation, or why there is none."""

    prompts: tuple[tuple[Span, ...], ...] = ()
    refusal: str | None = None
    wants_source: bool = False


class Channel:
    """Messages over a socket, each after its length; both processes use it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, value: object) -> None:
        data = msgspec.msgpack.encode(value)
        self._socket.sendall(len(data).to_bytes(_SIZE_BYTES, "big") + data)

    def receive(self, kind: type[T]) -> T:
        """Raises OSError (TimeoutError, where the socket has a timeout), EOFError, msgspec.DecodeError."""
        size_bytes = int.from_bytes(self._take(_SIZE_BYTES), "big")
        if size_bytes > _MOST_FRAME_BYTES:
            raise EOFError("what comes is no message")
        return msgspec.msgpack.decode(self._take(size_bytes), type=kind)

    def _take(self, size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        rest = memoryview(data)
        while rest:
            got = self._socket.recv_into(rest)
            if not got:
                raise EOFError("the other process has gone")
            rest = rest[got:]
        return data


class TemplateHelper:
    """At most one process, started when it is needed and replaced when it is gone. Calls block and must not overlap."""

    def __init__(self, *, deadline_s: float = DEADLINE_S, child: Sequence[str] = CHILD) -> None:
        self._deadline_s = deadline_s
        self._child = child
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, unless there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Returns when the process takes orders. Raises InternalError."""
        if self._process is None:
            self._process = _Process(self._child)

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def render(
        self, source: TemplateSource, conversations: Sequence[Messages], *, limit_bytes: int
    ) -> tuple[tuple[Span, ...], ...]:
        """A prompt for each conversation, of at most `limit_bytes` of text.

        Raises TemplateRefused, TemplateTooCostly after the deadline, and InternalError where no process starts.
        """
        order = Order(source.key, conversations, limit_bytes, self._deadline_s)
        for _ in range(_TRIES):
            self.start()
            try:
                return _prompts(self._ask(order, source))
            except TimeoutError:
                self.close()
                _log.warning("a chat template took longer than %g s: its process was ended", self._deadline_s)
                raise TemplateTooCostly(
                    f"The chat template does not come to an end within {self._deadline_s:g} s for these messages: "
                    "use another template."
                ) from None
            except (OSError, EOFError, msgspec.DecodeError) as error:
                self.close()
                _log.warning("the process that renders chat templates has ended: %s", error)
        raise TemplateTooCostly("The chat template ends the process that renders it: use another template.")

    def _ask(self, order: Order, source: TemplateSource) -> Reply:
        assert self._process is not None
        reply = self._process.ask(order, self._deadline_s)
        if reply.wants_source:
            reply = self._process.ask(msgspec.structs.replace(order, source=source), self._deadline_s)
        return reply


def _prompts(reply: Reply) -> tuple[tuple[Span, ...], ...]:
    if reply.refusal is not None:
        raise TemplateRefused(reply.refusal)
    return reply.prompts


class _Process:
    """A running child that has said that it is ready; it ends with this object at the latest."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._channel = Channel(ours)
        try:
            with theirs:  # in a session of its own: a terminal's Ctrl+C is not for it
                popen = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True
                )
        except OSError as error:
            ours.close()
            raise InternalError(f"Chat templates cannot be rendered: {error.strerror}.") from error
        self.pid = popen.pid
        self.end = weakref.finalize(self, _end, popen, ours)
        try:
            self._receive(_START_S)
        except (OSError, EOFError, msgspec.DecodeError) as error:
            self.end()
            raise InternalError(f"Chat templates cannot be rendered: their process does not start ({error}).") from None

    def ask(self, order: Order, timeout_s: float) -> Reply:
        self._socket.settimeout(timeout_s)
        self._channel.send(order)
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Reply:
        self._socket.settimeout(timeout_s)
        return self._channel.receive(Reply)


def _end(popen: subprocess.Popen[bytes], connection: socket.socket) -> None:
    """Leaves no child behind, dead or alive."""
    connection.close()
    popen.kill()
    popen.wait()
