"""An HTTP server whose answers a test writes: each piece that the script yields goes out as one chunk, at once."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[dict[str, Any]], Iterator[bytes]]
PATIENCE_S = 20.0  # after which a test that waits for the other side has failed


class Refusal(Exception):
    """Raised by a script instead of an answer."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status, self.body = status, body


@contextlib.contextmanager
def serving(script: Script, *, chunked: bool = True) -> Iterator[str]:
    """Yields the server's URL. Without `chunked`, the end of the connection ends an answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                pieces = script(body)
                first = next(pieces)
            except Refusal as refusal:
                self.send_response(refusal.status)
                self.send_header("Content-Length", str(len(refusal.body)))
                self.end_headers()
                self.wfile.write(refusal.body)
                return
            self.send_response(200)
            self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self._write(first)
                for piece in pieces:
                    self._write(piece)
                if chunked:
                    self.wfile.write(b"0\r\n\r\n")

        def _write(self, piece: bytes) -> None:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ollama_answer(body: dict[str, Any], tokens: int | None = None) -> Iterator[bytes]:
    """Lines of /api/chat: as many tokens as were asked for, and counts (each word a token, the template 10)."""
    count = body["options"]["num_predict"] if tokens is None else tokens
    for _ in range(count):
        yield b'{"message":{"role":"assistant","content":"word "},"done":false}\n'
    words = len(body["messages"][-1]["content"].split())
    last = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "length"}
    counts = {"prompt_eval_count": words + 10, "eval_count": count, "eval_duration": 2_000_000}
    yield json.dumps(last | counts).encode() + b"\n"


def openai_answer(body: dict[str, Any]) -> Iterator[bytes]:
    """Events of /v1/chat/completions, likewise."""
    yield b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    for _ in range(body["max_tokens"]):
        yield b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'
    yield b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'
    words = len(body["messages"][-1]["content"].split())
    usage = {"prompt_tokens": words + 10, "completion_tokens": body["max_tokens"]}
    yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"
