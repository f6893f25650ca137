"""Clients by the dozen that cost next to nothing: they share the server's cores, and the figures are to be its own."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from rustllama.bench.player import Address, Arrivals, Player, Recording
from rustllama.bench.wire import http_request
from tests.conftest import Server
from tests.hazards.conftest import Start
from tests.scrape import Scrape
from tests.test_serve import DEADLINE_S, post

_PING_EVERY_S = 0.02
_ESTABLISHED = "01"


def serving(start: Start, toy: Path, **settings: object) -> Server:
    """A server that has loaded `toy`."""
    server = start(**settings)
    post(server, "/api/create", {"name": "toy", "modelpath": str(toy)}).raise_for_status()
    post(server, "/api/chat", chat(1)).raise_for_status()
    return server


def chat(tokens: int, prompt: str = "hello", *, stream: bool = True) -> dict[str, object]:
    return {
        "model": "toy",
        "messages": [{"role": "user", "content": prompt}],
        "stream": stream,
        "options": {"num_predict": tokens, "temperature": 0},
    }


def request(server: Server, body: Mapping[str, object]) -> bytes:
    """Of /api/chat; the answer ends with the connection."""
    return http_request(server.url.removeprefix("http://"), "/api/chat", body)


def address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def connected(server: Server, sent: bytes, *, receive_bytes: int = 0) -> socket.socket:
    """A client that has sent so much."""
    client = socket.socket()
    if receive_bytes:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(DEADLINE_S)
    client.connect(address(server))
    client.sendall(sent)
    return client


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes
    took_ms: float = 0.0

    @classmethod
    def of(cls, data: bytes, took_ms: float = 0.0) -> Reply:
        """Raises HTTPException for what is not whole."""
        response = http.client.HTTPResponse(_Played(data))  # type: ignore[arg-type]
        response.begin()
        return cls(response.status, dict(response.getheaders()), response.read(), took_ms)

    @classmethod
    def to(cls, client: socket.socket) -> Reply:
        return cls.of(b"".join(iter(lambda: client.recv(65536), b"")))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def text(self) -> str:
        return "".join(line["message"]["content"] for line in self.lines)


class _Played:
    """As much of a socket as http.client wants."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def play(server: Server, asked: Sequence[bytes], concurrency: int) -> tuple[list[Reply], list[str]]:
    """What was answered, and what went wrong with the other connections."""
    recordings = [Recording(one) for one in asked]
    Player(Address.find(*address(server))).play(recordings, Arrivals(concurrency))
    replies, failures = list[Reply](), list[str]()
    for recording in recordings:
        data = b"".join(piece for _, piece in recording.pieces)
        try:
            assert recording.failure is None, recording.failure
            replies.append(Reply.of(data, (recording.pieces[-1][0] - recording.started_s) * 1e3))
        except (AssertionError, http.client.HTTPException) as error:
            failures.append(repr(error))
    return replies, failures


@contextmanager
def pinging(
    server: Server, path: str = "/api/version", body: Mapping[str, object] | None = None
) -> Iterator[list[float]]:
    """Asks on one connection, again and again, until the `with` ends; the milliseconds that each time took."""
    took_ms, over = list[float](), threading.Event()
    connection = http.client.HTTPConnection(*address(server), timeout=DEADLINE_S)
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body))

    def ping() -> None:
        while not over.wait(_PING_EVERY_S):
            began_s = time.perf_counter()
            connection.request(method, path, content)
            with connection.getresponse() as response:
                response.read()
            assert response.status == 200
            took_ms.append((time.perf_counter() - began_s) * 1e3)

    with ThreadPoolExecutor(1) as pool:
        pings = pool.submit(ping)
        try:
            yield took_ms
        finally:
            over.set()
            pings.result()
            connection.close()


def prompts_begun(server: Server) -> float:
    """How many prompts have got their first token."""
    text = requests.get(server.url + "/metrics", timeout=DEADLINE_S).text
    return Scrape(text).value("rustllama_prompts_total", source="computed")


def resident_mib(server: Server) -> float:
    """Memory of the worker."""
    pages = int(Path(f"/proc/{server.worker_pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def send_queues(server: Server) -> dict[int, int]:
    """Bytes that the kernel keeps for a client, by the client's port; for each connection that the server has open."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = f":{address(server)[1]:04X}"
    return {
        int(remote.rpartition(":")[2], 16): int(queues.partition(":")[0], 16)
        for _, local, remote, state, queues, *_ in rows
        if local.endswith(ours) and state == _ESTABLISHED
    }
