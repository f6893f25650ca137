"""What a server and the process of a pull tell each other, in lines of JSON, and that process as the server sees it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from rustllama import errors
from rustllama.errors import BadRequest, Cancelled, InternalError, RustllamaError
from rustllama.pull.progress import Fetched, Progress, Tell

CHILD = (sys.executable, "-m", "rustllama.pull_child")


class Order(Struct, frozen=True):
    source: str
    folder: str
    registry: str = ""
    public_only: bool = False


class Failure(Struct, frozen=True):
    """`kind` is a class of `errors`."""

    kind: str
    text: str
    field: str | None = None
    retry_after_s: int | None = None

    @property
    def error(self) -> RustllamaError:
        kind = getattr(errors, self.kind)
        error = kind(self.text, self.field) if issubclass(kind, BadRequest) else kind(self.text)
        error.retry_after_s = self.retry_after_s
        assert isinstance(error, RustllamaError)
        return error


class Message(Struct, frozen=True, omit_defaults=True):
    """One of the three. The last that comes is no progress."""

    progress: Progress | None = None
    fetched: Fetched | None = None
    failure: Failure | None = None


class PullProcess:
    """`run` is called once, in a thread that may block, and `end` at any moment, in any."""

    def __init__(self, order: Order, child: Sequence[str] = CHILD) -> None:
        self._order = order
        self._child = child
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._lock = threading.Lock()

    def run(self, tell: Tell) -> Fetched:
        """Raises RustllamaError: why the pull failed, or InternalError where the process was ended."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with process:
            try:
                os.write(process.stdin.fileno(), msgspec.json.encode(self._order) + b"\n")
                for line in process.stdout:
                    message = msgspec.json.decode(line, type=Message)
                    if message.progress is not None:
                        tell(message.progress)
                    elif message.failure is not None:
                        raise message.failure.error
                    elif message.fetched is not None:
                        return message.fetched
            except (BrokenPipeError, msgspec.MsgspecError):
                pass
            finally:
                process.kill()
        raise InternalError("The process of the pull was ended: pull again, which goes on where it stopped.")

    def end(self) -> None:
        """At once; what was fetched is on record."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._ended:
                raise Cancelled
            try:
                self._process = subprocess.Popen(
                    self._child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                )
            except OSError as error:
                raise InternalError(f"A pull could not be started in a process: {error.strerror}.") from error
            return self._process
