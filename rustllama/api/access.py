"""The outermost layer: each request's id, and what is counted and logged when its response has ended."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from werkzeug.wsgi import ClosingIterator

from rustllama.addresses import is_local
from rustllama.core import Usage
from rustllama.engine.tally import Ended, Tally
from rustllama.errors import RustllamaError
from rustllama.keys import ApiKey

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_KEY = "rustllama.call"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_LOG = logging.getLogger("rustllama.access")


@dataclass(slots=True)
class Call:
    """A request on its way; handlers note here what the log line and the counts tell."""

    id: str
    method: str
    path: str
    client: str = ""  # its address, where that is another machine's
    started_ns: int = field(default_factory=time.monotonic_ns)
    status: int = 0
    outcome: str = "ok"  # see `tally.Ended`
    key: ApiKey | None = None  # whose the request is
    release: Callable[[], None] | None = None  # called at the end
    model: str = ""
    usage: Usage | None = None
    first_token_ns: int = 0  # after the start

    @property
    def elapsed_ns(self) -> int:
        return time.monotonic_ns() - self.started_ns

    def failed(self, error: RustllamaError | type[RustllamaError]) -> None:
        self.status, self.outcome = error.status, error.code

    def line(self) -> str:
        """Never holds a prompt, an answer or a secret."""
        words = [f"{self.id} {self.method} {quote(self.path)} {self.status} {self.elapsed_ns / 1e6:.1f}ms"]
        if self.key is not None:
            words.append(f"key={self.key.name}")
        if self.client:
            words.append(f"client={self.client}")
        if self.model:
            words.append(f"model={self.model}")
        if self.usage is not None:
            seconds = self.usage.eval_ns / 1e9
            words += [
                f"prompt_tokens={self.usage.prompt_tokens}",
                f"cached_tokens={self.usage.cached_tokens}",
                f"answer_tokens={self.usage.completion_tokens}",
                f"queue_ms={self.usage.queue_ns / 1e6:.1f}",
                f"first_token_ms={self.first_token_ns / 1e6:.1f}",
                f"tokens_per_s={self.usage.completion_tokens / seconds if seconds else 0:.1f}",
            ]
        return " ".join(words)


def call_of(environ: WSGIEnvironment) -> Call:
    """The Call that AccessLog made for this request."""
    call = environ[_KEY]
    assert isinstance(call, Call)
    return call


class AccessLog:
    """WSGI middleware around the whole application."""

    def __init__(self, app: WSGIApplication, tally: Tally) -> None:
        self._app = app
        self._tally = tally

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        call = Call(_id(environ), environ["REQUEST_METHOD"], environ.get("PATH_INFO", ""), _client(environ))
        environ[_KEY] = call

        def start(
            status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
        ) -> Callable[[bytes], object]:
            call.status = int(status[:3])
            return start_response(status, [*headers, ("X-Request-Id", call.id)], exc_info)

        with ExitStack() as ending:
            ending.callback(self._ended, call)
            return ClosingIterator(self._app(environ, start), ending.pop_all().close)

    def _ended(self, call: Call) -> None:
        if call.release is not None:
            call.release()
        self._tally.requests[Ended(call.model, call.status, call.outcome)] += 1
        _LOG.info(call.line())


def _client(environ: WSGIEnvironment) -> str:
    address = environ.get("REMOTE_ADDR", "")
    return "" if is_local(address) else address


def _id(environ: WSGIEnvironment) -> str:
    """The client's own where it is fit for a log and a header."""
    given = environ.get("HTTP_X_REQUEST_ID", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex
