"""What a client may take of a running server: time for heads, bodies and answers, and connections."""

from __future__ import annotations

import json
import re
import resource
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.conftest import Server, start_server
from tests.test_serve import DEADLINE_S, ask, lines, resources, started, stream, until
from tests.toys import LLAMA, write_toy

LIMIT_S = 0.3
SHORT = {f"RUSTLLAMA_{name}_TIMEOUT": str(LIMIT_S) for name in ("HEAD", "BODY", "WRITE")}
CHAT_HEAD = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n"
SIZED, CHUNKED = b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for nobody, with a toy that takes some milliseconds a token."""
    folder = tmp_path_factory.mktemp("hasty")
    toy = write_toy(folder / "slow.gguf", LLAMA, width=256, layers=6, heads=8, feed_forward=1024, vocabulary=2048)
    server = started(folder / "home", toy, **SHORT)
    yield server
    assert server.stop() == 0


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.settimeout(DEADLINE_S)
    client.connect((host, int(port)))
    return client


def readable(client: socket.socket, timeout_s: float) -> bool:
    with selectors.DefaultSelector() as ready:  # select() knows no more than 1,024 files
        ready.register(client, selectors.EVENT_READ)
        return bool(ready.select(timeout_s))


def answer(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of what comes until the server closes."""
    head, _, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")
    return head, body


def trickle(client: socket.socket, piece: bytes) -> tuple[bytes, bytes]:
    """Sends `piece` again and again, until there is an answer."""

    def answered() -> bool:
        client.sendall(piece)
        return readable(client, LIMIT_S / 10)

    until(answered)
    return answer(client)


def healthy(server: Server, **headers: str) -> bool:
    return requests.get(server.url + "/health", headers=headers, timeout=DEADLINE_S).ok


def be_healthy(client: socket.socket) -> None:
    """Asks for /health on a connection that stays open, and reads the answer."""
    client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    read = client.makefile("rb", 0)
    assert read.readline() == b"HTTP/1.1 200 OK\r\n"
    for line in iter(read.readline, b'{"status":"ok"}\n'):
        assert line


@pytest.mark.parametrize("first", [True, False])
def test_a_head_that_trickles_is_cut_with_a_408(hasty: Server, first: bool) -> None:
    with connect(hasty) as client:
        if not first:
            be_healthy(client)
        client.sendall(b"GET /health HTTP/1.1\r\nX: ")
        head, body = trickle(client, b"x")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert "RUSTLLAMA_HEAD_TIMEOUT" in json.loads(body)["error"]


def test_a_connection_that_says_nothing_is_closed_without_a_word(hasty: Server) -> None:
    with connect(hasty) as client:
        assert client.recv(1) == b""


def test_a_connection_may_rest_between_requests(hasty: Server) -> None:
    with connect(hasty) as client:
        be_healthy(client)
        for _ in range(2):
            assert not readable(client, 2 * LIMIT_S)
            be_healthy(client)


@pytest.mark.parametrize(("framing", "piece"), [(SIZED, b""), (SIZED, b" "), (CHUNKED, b""), (CHUNKED, b"1\r\n \r\n")])
def test_a_body_that_trickles_or_never_comes_is_cut_with_a_408(hasty: Server, framing: bytes, piece: bytes) -> None:
    with connect(hasty) as client:
        client.sendall(CHAT_HEAD + framing + piece)
        head, body = trickle(client, piece)
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close" in head
    assert "RUSTLLAMA_BODY_TIMEOUT" in json.loads(body)["error"]


def test_a_slow_body_is_refused_in_its_own_dialect(hasty: Server) -> None:
    with connect(hasty) as client:
        client.sendall(CHAT_HEAD.replace(b"/api/chat", b"/v1/chat/completions") + SIZED)
        assert json.loads(answer(client)[1])["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("framing", [SIZED, CHUNKED])
def test_a_body_that_nobody_wants_is_not_waited_for_either(hasty: Server, framing: bytes) -> None:
    with connect(hasty) as client:
        client.sendall(CHAT_HEAD.replace(b"/api/chat", b"/api/nothing") + framing)
        head, body = answer(client)
    assert head.startswith(b"HTTP/1.1 404 ")
    assert body.count(b"\n") == 1


@pytest.mark.parametrize("framing", [b"Content-Length: %d\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n%x\r\n"])
def test_a_body_that_nobody_wants_is_never_taken_for_the_next_request(hasty: Server, framing: bytes) -> None:
    smuggled = b"GET /api/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    end = b"\r\n0\r\n\r\n" if b"chunked" in framing else b""
    with connect(hasty) as client:
        client.sendall(CHAT_HEAD.replace(b"/api/chat", b"/api/nothing") + framing % len(smuggled) + smuggled + end)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        said = b"".join(answer(client))
    assert said.startswith(b"HTTP/1.1 404 ")
    assert said.count(b"HTTP/1.1 ") == 2
    assert said.endswith(b'{"status":"ok"}\n')


def test_an_answer_may_take_longer_than_any_of_these_limits(hasty: Server) -> None:
    tokens = 300
    while ask(hasty, tokens).json()["total_duration"] <= LIMIT_S * 1e9:
        tokens *= 2  # a fast machine
    assert lines(stream(hasty, tokens))[-1]["eval_count"] == tokens


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Server]:
    """A server for few, which believes the proxies of this machine."""
    limits = {"RUSTLLAMA_MAX_CONNECTIONS": "4", "RUSTLLAMA_MAX_CONNECTIONS_PER_CLIENT": "2"}
    server = start_server(tmp_path / "home", environ={**limits, "RUSTLLAMA_PROXIES": "127.0.0.1"})
    yield server
    assert server.stop() == 0


def test_a_connection_too_many_is_told_so_at_once(small: Server) -> None:
    clients = [connect(small) for _ in range(4)]
    with connect(small) as surplus:
        surplus.sendall(CHAT_HEAD + SIZED + bytes(50_000))
        head, body = answer(surplus)
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 2\r\n" in head
    assert "RUSTLLAMA_MAX_CONNECTIONS " in json.loads(body)["error"]
    for client in clients:
        client.close()
    until(lambda: healthy(small))


def test_many_that_are_refused_do_not_keep_others_from_being_refused(small: Server) -> None:
    clients = [connect(small) for _ in range(300)]
    assert sum(readable(client, DEADLINE_S) for client in clients[4:]) == 296
    assert resources(small)[1] < 150  # those that linger are few
    until(lambda: sum(map(int, re.findall(r" refused .*Busy \((\d+)\)", small.log.read_text()))) >= 296)
    assert small.log.read_text().count(" refused ") < 30
    for client in clients:
        client.close()
    until(lambda: healthy(small))


def test_a_client_behind_a_proxy_has_a_limit_of_its_own(small: Server) -> None:
    asking = [connect(small) for _ in range(2)]
    for client in asking:
        client.sendall(CHAT_HEAD + b"X-Forwarded-For: 192.0.2.1, 203.0.113.7\r\n" + SIZED)
    theirs = {"X-Forwarded-For": "203.0.113.7"}
    until(lambda: not healthy(small, **theirs))
    refused = requests.get(small.url + "/health", headers=theirs, timeout=DEADLINE_S)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert healthy(small, **{"X-Forwarded-For": "203.0.113.7, 192.0.2.1"})
    assert healthy(small)
    for client in asking:
        client.close()
    until(lambda: healthy(small, **theirs))
    until(lambda: "GET /health 200" in small.log.read_text() and " client=203.0.113.7" in small.log.read_text())


def _address_beyond_loopback() -> str:
    """One of this machine's own; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way_out:
        try:
            way_out.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return str(way_out.getsockname()[0])


def test_another_machine_has_so_many_connections_and_is_told(tmp_path: Path) -> None:
    settings = {"HOST": f"{_address_beyond_loopback()}:0", "INSECURE_NO_AUTH": "1", "MAX_CONNECTIONS_PER_CLIENT": "2"}
    server = start_server(tmp_path / "home", environ={f"RUSTLLAMA_{name}": value for name, value in settings.items()})
    with connect(server), connect(server), connect(server) as surplus:
        head, body = answer(surplus)
    assert head.startswith(b"HTTP/1.1 429 ")
    assert "RUSTLLAMA_MAX_CONNECTIONS_PER_CLIENT " in json.loads(body)["error"]
    until(lambda: healthy(server))
    assert server.stop() == 0


def test_a_stranger_is_not_believed_whom_he_asks_for(server: Server) -> None:
    headers = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https", "X-Request-Id": "stranger"}
    assert healthy(server, **headers)
    until(lambda: "stranger GET /health 200" in server.log.read_text())
    assert "client=" not in server.log.read_text()


@pytest.mark.parametrize(("soft", "hard", "expected"), [(5000, 5000, 4096), (300, 5000, 4096), (300, 1256, 1000)])
def test_there_are_as_many_connections_as_files_may_be_open(soft: int, hard: int, expected: int) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from rustllama.connections import affordable\n"
        "print(affordable(4096), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    most, limit = map(int, done.stdout.split())
    assert most == expected
    assert limit >= most + 256
    assert ("raise that limit" in done.stderr) is (most < 4096)


def test_a_server_may_open_as_many_files_as_it_takes_connections(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(list(Path("/proc/self/fd").iterdir())) + 256  # this process needs its own
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        server = start_server(tmp_path / "home", environ={"RUSTLLAMA_MAX_CONNECTIONS": str(few)})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(server.worker_pid, resource.RLIMIT_NOFILE)[0] > few
    assert server.stop() == 0
