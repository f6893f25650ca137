"""`POST /api/pull`: a model is fetched from where people keep them, and registered."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import msgspec
from flask import Flask, Response, request
from msgspec import Struct

from rustllama.api.access import Call, call_of
from rustllama.api.decoding import typed
from rustllama.api.failures import encode_failure, ollama_shape
from rustllama.api.guard import body
from rustllama.api.keys import check_model
from rustllama.api.pulls import Pulls
from rustllama.bridge import watch_client
from rustllama.engine.manager import EngineManager
from rustllama.errors import BadRequest, Cancelled, Draining, RustllamaError
from rustllama.registry import check_name

_NDJSON = "application/x-ndjson"
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Lines = Generator[bytes, None, None]


class PullBody(Struct, frozen=True, rename={"given_name": "as"}):
    """`model` is the source; its alias is `name`. The model gets the source's name, or the one behind `as`."""

    model: str = ""
    name: str = ""
    given_name: str = ""
    stream: bool = False
    insecure: bool = False


class PullEndpoint:
    def __init__(self, pulls: Pulls, manager: EngineManager) -> None:
        self._pulls = pulls
        self._manager = manager

    def register(self, app: Flask) -> None:
        app.add_url_rule("/api/pull", view_func=self.pull, methods=["POST"])

    def pull(self) -> Response:
        asked = typed(PullBody, body())
        if asked.insecure:
            raise BadRequest("'insecure' is refused: a model is pulled over https that is verified.", "insecure")
        text = asked.model or asked.name
        name = check_name(asked.given_name or self._pulls.source(text).name)
        check_model(name)
        call = call_of(request.environ)
        call.model = name
        lines = self._lines(text, name, request.environ)
        if asked.stream:
            return Response(_told(lines, call), content_type=_NDJSON, headers=_STREAM_HEADERS)
        *_, last = lines
        return Response(last, content_type="application/json")

    def _lines(self, text: str, name: str, environ: Mapping[str, Any]) -> Lines:
        with watch_client(environ), self._pulls.shared(text, name) as pull:
            for progress in pull.progress(self._check_draining):
                yield msgspec.json.encode(progress) + b"\n"
        yield msgspec.json.encode({"status": "success", "model": name}) + b"\n"

    def _check_draining(self) -> None:
        if self._manager.draining:
            raise Draining("The server is stopping: pull again when it is back, which goes on where this one stopped.")


def _told(lines: Lines, call: Call) -> Lines:
    """With what goes wrong as the last line."""
    try:
        yield from lines
    except Cancelled as error:
        call.failed(error)
    except RustllamaError as error:
        call.failed(error)
        yield encode_failure(error, call, ollama_shape) + b"\n"
