"""A command in a pseudo-terminal of 80 by 24: what it shows, as text, and keys for it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import selectors
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

PATIENCE_S = 60.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>]|\r")

_TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
for number in (signal.SIGHUP, signal.SIGINT):  # as a shell does, whatever runs the tests in its background
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "rustllama", *sys.argv[1:]])
"""


class Terminal:
    """`rustllama ARGUMENTS` on a terminal; `raw` is all bytes it wrote so far."""

    def __init__(self, arguments: tuple[str, ...], environ: Mapping[str, str]) -> None:
        self._screen, tty = pty.openpty()
        fcntl.ioctl(tty, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.raw = b""
        self._read_to = 0
        self.process = subprocess.Popen(
            [sys.executable, "-SEc", _TAKE_TERMINAL, *arguments],
            stdin=tty,
            stdout=tty,
            stderr=tty,
            env={**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **environ},
            start_new_session=True,
        )
        os.close(tty)

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait_for(self, text: str) -> str:
        """What was shown since the last wait, up to `text`."""
        deadline = time.monotonic() + PATIENCE_S
        while (place := self.text.find(text, self._read_to)) < 0:
            left_s = deadline - time.monotonic()
            came = left_s > 0 and self.read_some(left_s)
            assert came, f"{text!r} never came: {self.text[self._read_to :]!r}"
        begin, self._read_to = self._read_to, place + len(text)
        return self.text[begin : self._read_to]

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Waits for what happens elsewhere."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            self.read_some()

    def wait_for_end(self) -> int:
        """The exit status, once the command has ended."""
        while self.read_some(PATIENCE_S):
            pass
        return self.process.wait(PATIENCE_S)

    @property
    def text(self) -> str:
        return _ESCAPES.sub("", self.raw.decode(errors="replace"))

    def close(self) -> None:
        """Closes the window, once or more."""
        if self._screen >= 0:
            os.close(self._screen)
            self._screen = -1

    def read_some(self, timeout_s: float = 0.01) -> bytes:
        """What came, at once; nothing at the end, and nothing for too long."""
        with selectors.DefaultSelector() as ready:  # select() knows no more than 1,024 files
            ready.register(self._screen, selectors.EVENT_READ)
            if not ready.select(timeout_s):
                return b""
        with suppress(OSError):  # Linux's way to say that the other side is closed
            piece = os.read(self._screen, 65536)
            self.raw += piece
            return piece
        return b""


@contextmanager
def terminal(*arguments: str, **environ: str) -> Iterator[Terminal]:
    """Closing it is closing the window: the command gets SIGHUP."""
    found = Terminal(arguments, environ)
    try:
        yield found
    finally:
        found.close()
        found.process.wait(PATIENCE_S)
