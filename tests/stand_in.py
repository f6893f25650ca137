"""A server that answers what a test scripts, for what the real one never says: breaks, strangers, escape codes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG = b"<hang>"  # instead of a chunk: wait until the client hangs up
BREAK = b"<break>"  # instead of a chunk: close the connection in mid-stream

Answer = bytes | tuple[int, bytes] | Callable[[dict[str, Any]], Iterable[bytes]]


def line(text: str = "", **fields: object) -> bytes:
    """A line of a streamed answer."""
    return json.dumps({"message": {"role": "assistant", "content": text}, "done": False, **fields}).encode() + b"\n"


def status_line(status: str, **fields: object) -> bytes:
    """A line that comes before the first word."""
    return line("", status=status, model="demo", **fields)


def last_line(**fields: object) -> bytes:
    return line("", done=True, done_reason="stop", **fields)


def model(name: str, path: str = "/models/x.gguf", **fields: object) -> dict[str, object]:
    details = {"family": "llama", "parameter_size": "1.2B", "quantization_level": "Q8_0"}
    return {"name": name, "path": path, "size": 1_300_000_000, "details": details, **fields}


@dataclass(slots=True)
class StandIn:
    """`answers` maps `METHOD /path` to a body, to a status and a body, or to a script of chunks."""

    url: str
    answers: dict[str, Answer] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)

    def bodies(self, route: str) -> list[dict[str, Any]]:
        return [body for seen, body in self.seen if seen == route]

    def models(self, *models: dict[str, object]) -> None:
        self.answers["GET /api/list"] = json.dumps({"models": models}).encode()

    def says(self, *pieces: bytes) -> None:
        """What a chat answers; one without messages answers that the model is loaded."""
        self.answers["POST /api/chat"] = lambda body: pieces if body["messages"] else [last_line()]


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    found = StandIn(f"http://127.0.0.1:{server.server_port}")
    found.answers["GET /api/version"] = b'{"version":"0.6.4","rustllama":"0.1.0"}'
    found.models(model("demo"))
    found.says(line("Hello"), line(" there."), last_line())
    server.stand_in = found  # type: ignore[attr-defined]
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        found: StandIn = self.server.stand_in  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        route = f"{self.command} {self.path}"
        found.seen.append((route, body))
        answer = found.answers.get(route, (404, b'{"error":"unknown path"}'))
        if callable(answer):
            self._stream(answer(body), found)
        else:
            self._reply(*((200, answer) if isinstance(answer, bytes) else answer))

    do_GET = do_POST = do_DELETE = _answer

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, pieces: Iterable[bytes], found: StandIn) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            if piece == HANG:
                self.connection.recv(1)
                found.hung_up.set()
            if piece in (HANG, BREAK):
                self.close_connection = True
                return
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass
