"""No crowd keeps others from being served: many at once, more than the queue holds, who sends slowly or never reads."""

from __future__ import annotations

import itertools
import selectors
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import pytest

from tests.conftest import Server
from tests.hazards import WHOLE, times
from tests.hazards.conftest import Start
from tests.hazards.crowd import (
    Reply,
    chat,
    connected,
    pinging,
    play,
    request,
    resident_mib,
    send_queues,
    serving,
)
from tests.hazards.table import Row, percentile
from tests.test_limits import be_healthy, connect
from tests.test_serve import DEADLINE_S, loaded, until
from tests.toys import LLAMA, write_toy

LOOK_EVERY_S = 0.1
ROUND = 10
HEAD = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
BODY = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
RUNNING = 800  # tokens of an answer that others have to wait for
READERS = 8
READERS_BUFFER_BYTES = 4096


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It takes some milliseconds for a token, so that answers are on their way at the same time."""
    folder = tmp_path_factory.mktemp("slow")
    return write_toy(folder / "slow.gguf", LLAMA, width=256, layers=6, heads=8, feed_forward=1024, vocabulary=2048)


@pytest.fixture(scope="module")
def fast_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It soon has said more than the kernel keeps for a client."""
    return write_toy(tmp_path_factory.mktemp("fast") / "fast.gguf", context_length=8192)


def test_32_streaming_clients(row: Row, start: Start, toy: Path) -> None:
    server = serving(start, toy)
    asked = [request(server, chat(10))] * times(32 * 10, 32 * 2)
    with pinging(server) as ms:
        replies, failures = play(server, asked, 32)
    ends = [reply.lines[-1] for reply in replies if reply.status == 200]
    row.is_at_most(f"errors among {len(asked)}", len(asked) - len(ends), 0)
    row.is_at_most("streams that do not end done", sum(end.get("done") is not True for end in ends), 0)
    row.is_within("/api/version p99", percentile(ms, 0.99), 50)
    assert not failures
    assert {end["eval_count"] for end in ends} == {10}
    assert len({reply.text for reply in replies}) == 1


def test_a_full_queue(row: Row, start: Start, toy: Path) -> None:
    server = serving(start, toy, SLOTS=1, MAX_QUEUE=16)
    surplus, slowest_ms = 0, 0.0
    for _ in range(times(10, 1)):
        running = connected(server, request(server, chat(RUNNING)))
        until(lambda: loaded(server)["running"] == 1)
        queued = [connected(server, request(server, chat(3, stream=bool(number % 2)))) for number in range(16)]
        until(lambda: loaded(server)["queued"] == 16)
        replies, failures = play(server, [request(server, chat(3))] * 20, 20)
        assert not failures
        surplus += sum(reply.status == 503 and int(reply.headers["Retry-After"]) > 0 for reply in replies)
        slowest_ms = max(slowest_ms, *(reply.took_ms for reply in replies))
        assert [_ends(client) for client in (running, *queued)] == [RUNNING] + [3] * 16
    row.is_at_least("503 with Retry-After of the surplus", surplus, times(200, 20))
    row.is_within("the slowest of them", slowest_ms, 100)


def _ends(client: socket.socket) -> object:
    """The tokens of an answer that came to its end."""
    with client:
        return Reply.to(client).lines[-1]["eval_count"]


def test_slow_heads_and_bodies(row: Row, start: Start, toy: Path) -> None:
    server = serving(start, toy, **({} if WHOLE else {"HEAD_TIMEOUT": 0.5, "BODY_TIMEOUT": 1}))
    began_s = time.monotonic()
    heads = [connected(server, HEAD) for _ in range(times(200, 40))]
    bodies = [connected(server, BODY) for _ in range(times(50, 10))]
    with pinging(server, "/api/chat", chat(1, stream=False)) as ms:
        cut = _trickle([*heads, *bodies], began_s)
    row.is_within("heads cut after", max(cut[client].after_s for client in heads), 15, " s")
    row.is_within("bodies cut after", max(cut[client].after_s for client in bodies), 35, " s")
    row.is_within("a chat p99", percentile(ms, 0.99), 200)
    assert {one.said[:13] for one in cut.values()} == {b"HTTP/1.1 408 "}


@pytest.mark.skipif(not WHOLE, reason="nothing but waiting, for more than a minute")
def test_idle_connections(row: Row, start: Start) -> None:
    server = start()
    began_s = time.monotonic()
    clients = [connect(server) for _ in range(100)]
    for client in clients:
        be_healthy(client)
    row.is_within("closed after", max(one.after_s for one in _trickle(clients, began_s, b"").values()), 80, " s")


@dataclass(frozen=True, slots=True)
class Cut:
    after_s: float
    said: bytes


def _trickle(clients: Iterable[socket.socket], began_s: float, piece: bytes = b" ") -> Mapping[socket.socket, Cut]:
    """Each sends `piece` once a second, until the server has hung up on all of them."""
    cut, turns = dict[socket.socket, Cut](), itertools.count()
    with selectors.DefaultSelector() as waiting:
        for client in clients:
            waiting.register(client, selectors.EVENT_READ)
        while waiting.get_map():
            assert time.monotonic() < began_s + 3 * DEADLINE_S
            for key, _ in waiting.select(LOOK_EVERY_S):
                client = _client(key)
                waiting.unregister(client)
                said = b"".join(iter(partial(client.recv, 4096), b""))
                cut[client] = Cut(time.monotonic() - began_s, said)
                client.close()
            for key in list(waiting.get_map().values())[next(turns) % ROUND :: ROUND]:
                _client(key).send(piece)
    return cut


def _client(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def test_readers_that_never_read(row: Row, start: Start, fast_toy: Path) -> None:
    """What others get is compared with what they get before and after, while the readers do read."""
    limit_s = 60 if WHOLE else 1
    server = serving(start, fast_toy, SLOTS=READERS + 4, WRITE_TIMEOUT=limit_s, PROMPT_CACHE_MEMORY=0)
    asked = [request(server, chat(times(7500, 1500)))] * READERS
    usual_ms = _beside_who_reads_ms(server, asked)
    before_mib = resident_mib(server)
    readers = [connected(server, one, receive_bytes=READERS_BUFFER_BYTES) for one in asked]
    with ThreadPoolExecutor(1) as pool:
        watch = pool.submit(_watch, server, readers)
        others_ms = _others_ms(server)
        most_mib, blocked_s = watch.result()
    usual_ms += _beside_who_reads_ms(server, asked)
    row.is_within("time of others", median(others_ms) / median(usual_ms), 1 / 0.8, " of usual")
    row.is_within("RSS of the worker", most_mib - before_mib, 32, " MiB more")
    row.is_within("cut off the limit by", max(abs(one - limit_s) for one in blocked_s), 5, " s")
    for reader in readers:
        with pytest.raises(ConnectionResetError), reader:
            Reply.to(reader)
    until(lambda: server.log.read_text().count(" POST /api/chat 499 ") == READERS)


def _beside_who_reads_ms(server: Server, asked: Sequence[bytes]) -> list[float]:
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(play, server, asked, READERS)
        took_ms = _others_ms(server)
        assert not reading.result()[1]
    return took_ms


def _others_ms(server: Server) -> list[float]:
    """What each of four answers at a time takes."""
    took_ms = list[float]()
    for _ in range(times(9, 1)):
        replies, failures = play(server, [request(server, chat(times(300, 50)))] * 4, 4)
        assert not failures
        took_ms += [reply.took_ms for reply in replies]
    return took_ms


def _watch(server: Server, readers: Iterable[socket.socket]) -> tuple[float, list[float]]:
    """Until the server has cut them all: its most memory, and how long each could be sent nothing."""
    ports = {reader.getsockname()[1] for reader in readers}
    blocked, most_mib = dict[int, tuple[int, float]](), 0.0
    blocked_s = dict[int, float]()
    deadline_s = time.monotonic() + 4 * DEADLINE_S
    while len(blocked_s) < len(ports):
        now_s, queues = time.monotonic(), send_queues(server)
        assert now_s < deadline_s
        most_mib = max(most_mib, resident_mib(server))
        for port in ports - blocked_s.keys():
            if port not in queues:
                blocked_s[port] = now_s - blocked[port][1]
            elif port not in blocked or blocked[port][0] != queues[port]:
                blocked[port] = queues[port], now_s
        time.sleep(LOOK_EVERY_S)
    return most_mib, list(blocked_s.values())
