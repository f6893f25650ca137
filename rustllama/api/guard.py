"""What a request passes before its handler: where it comes from, its key, its size, and whether work is taken."""

from __future__ import annotations

from collections.abc import Iterator

from flask import Flask, Response, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import RequestEntityTooLarge

from rustllama.api.decoding import Fields, parse_object
from rustllama.api.hosts import Hosts
from rustllama.api.keys import Keys
from rustllama.api.origins import Origins
from rustllama.engine.manager import EngineManager
from rustllama.errors import BadRequest, Draining
from rustllama.settings import Settings

_READING = ("GET", "HEAD", "OPTIONS")
_PIECE_BYTES = 1 << 20


class Guard:
    """Checks in the order in which they are cheap; nothing here reads the body."""

    def __init__(self, settings: Settings, manager: EngineManager, keys: Keys) -> None:
        self._settings = settings
        self._manager = manager
        self._hosts = Hosts(settings)
        self._origins = Origins(settings)
        self._keys = keys

    def install(self, app: Flask) -> None:
        app.config["MAX_CONTENT_LENGTH"] = self._settings.max_body
        app.before_request(self.check)
        app.after_request(lambda response: self._origins.mark(response, request.headers))

    def check(self) -> Response | None:
        """An answer for a preflight, None for what may go on.

        Raises Forbidden for who may not ask, what `Keys.admit` does, and Draining for what generates or alters while
        the server is leaving.
        """
        self._hosts.check(request.headers.get("Host"))
        self._origins.check(request.headers)
        if request.method == "OPTIONS" and request.url_rule and self._origins.is_preflight(request.headers):
            return self._origins.preflight(request.headers)
        self._keys.admit()
        if self._manager.draining and request.method not in _READING and request.path != "/api/show":
            raise Draining("The server is stopping: try again when it is back.")
        return None


def body() -> Fields:
    """The JSON object of the current request, whatever its content type. Raises BadRequest."""
    try:
        data = request.get_data(cache=False)
    except ParseException as error:  # Gunicorn's, of a chunked body
        raise BadRequest(f"The body is not well chunked: {error}.") from None
    if request.content_length is None and len(data) == request.max_content_length:
        raise RequestEntityTooLarge  # of a chunked body, werkzeug keeps what is below the limit and says nothing
    return parse_object(data)


def expect_large_body() -> None:
    """The body of the current request is of any size, and only has to keep coming."""
    client = request.environ.get("gunicorn.socket")
    if client is not None:
        client.expect_large_body()


def pieces() -> Iterator[bytes]:
    """The body of the current request as it comes, of any size. Raises BadRequest where it ends too soon, TooSlow."""
    expect_large_body()
    stream, length, received = request.environ["wsgi.input"], request.content_length, 0
    try:
        while piece := stream.read(_PIECE_BYTES):
            received += len(piece)
            yield piece
    except (ParseException, OSError) as error:
        raise BadRequest(f"The body did not come whole: {error}.") from None
    if length is not None and received < length:
        raise BadRequest(f"The body ended after {received} of {length} bytes: send it again.")
