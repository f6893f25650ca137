"""A host of files as a test wants it: with ranges and tags, faults that are met once each, and a record of requests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[["Handler", bytes], None]
"""Answers in the place of the host, which would send these bytes."""


@dataclass(slots=True)
class Host:
    """`files` are served with ETag and ranges; `faults` are taken from the left, one for each request that is no look
    and whose path holds `faulty`. A look is a request for the first byte alone.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    faults: deque[Fault] = field(default_factory=deque)
    seen: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    sent_bytes: int = 0
    ranges: bool = True
    faulty: str = ""

    def json(self, path: str, value: object) -> None:
        self.files[path] = json.dumps(value).encode()

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def authorizations(self) -> set[str | None]:
        return {headers.get("Authorization") for _, headers in self.seen}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def host(self) -> Host:
        host: Host = self.server.host  # type: ignore[attr-defined]
        return host

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that leaves
            super().handle()

    def do_GET(self) -> None:
        host = self.host
        host.seen.append((self.path, dict(self.headers)))
        body = host.files.get(self.path.partition("?")[0])
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if host.ranges else None
        with contextlib.suppress(ConnectionError):
            if host.faults and host.faulty in self.path and (asked is None or asked[2] != "0"):
                host.faults.popleft()(self, body or b"")
            elif self.path in host.redirects:
                self.answer(302, headers={"Location": host.redirects[self.path]})
            elif body is None:
                self.answer(404)
            else:
                self._serve(body, asked)

    def _serve(self, body: bytes, asked: re.Match[str] | None) -> None:
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        if asked is None or self.headers.get("If-Range", tag) != tag:
            self.answer(200, body, {"ETag": tag})
            return
        start, end = int(asked[1]), min(int(asked[2]), len(body) - 1)
        self.answer(206, body[start : end + 1], {"ETag": tag, "Content-Range": f"bytes {start}-{end}/{len(body)}"})

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), **self.host.headers, **(headers or {})}
        for name, value in fields.items():
            self.send_header(name, value)
        self.host.sent_bytes += len(body)  # first: a client that has the headers may be a test that looks
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def refuse(status: int, **headers: str) -> Fault:
    return lambda handler, _: handler.answer(status, b"no", {name.replace("_", "-"): v for name, v in headers.items()})


def cut(after_bytes: int) -> Fault:
    """Closes the connection in the middle of an answer."""

    def fault(handler: Handler, body: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        assert asked
        start, end = int(asked[1]), int(asked[2])
        handler.send_response(206)
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()[:16]}"')
        handler.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
        handler.send_header("Content-Length", str(end + 1 - start))
        handler.end_headers()
        handler.wfile.write(body[start : start + after_bytes])
        handler.close_connection = True

    return fault


def stall(after_bytes: int) -> Fault:
    """Says nothing more in the middle of an answer, until the client hangs up."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.host.sent_bytes += after_bytes
        cut(after_bytes)(handler, body)
        handler.connection.settimeout(60)
        handler.connection.recv(1)

    return fault


def hang(until: threading.Event) -> Fault:
    def fault(handler: Handler, _: bytes) -> None:
        until.wait(20)
        handler.close_connection = True

    return fault


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def hosting(address: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Host]:
    server = ThreadingHTTPServer((address, 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    host = Host(f"{'http' if tls is None else 'https'}://{address}:{server.server_port}")
    server.host = host  # type: ignore[attr-defined]
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
