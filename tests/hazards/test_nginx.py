"""Debian's nginx in front: it streams, it passes on that a client left, and it asks for nothing twice."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from tests.conftest import Server
from tests.hazards import times
from tests.hazards.conftest import Start
from tests.hazards.table import Row, percentile
from tests.nginx import Nginx, needs_nginx
from tests.scrape import Scrape
from tests.test_serve import DEADLINE_S, post, slow_toy, until

__all__ = ["slow_toy"]  # a fixture

pytestmark = needs_nginx
ENDLESS = 20_000  # tokens: nobody waits for the last one
DISCONNECTS = times(100, 4)
KILLS = times(20, 2)


@pytest.fixture
def upstream(start: Start, slow_toy: Path) -> Server:
    server = start(NUM_CTX=4096)
    post(server, "/api/create", {"name": "toy", "modelpath": str(slow_toy)}).raise_for_status()
    return server


@pytest.fixture
def nginx(tmp_path: Path, upstream: Server) -> Iterator[Nginx]:
    folder = tmp_path / "nginx"
    folder.mkdir()
    with Nginx(folder, urlsplit(upstream.url).netloc) as running:
        yield running


def generate(tokens: int, *, stream: bool = True) -> bytes:
    options = {"num_predict": tokens, "temperature": 0}
    body = {"model": "toy", "prompt": "hello", "raw": True, "shift": True, "stream": stream, "options": options}
    return json.dumps(body).encode()


def computing(nginx: Nginx, server: Server, *, stream: bool, request_id: str = "") -> http.client.HTTPConnection:
    """A generation that has its slot and comes to no end by itself."""
    asking = nginx.send("POST", "/api/generate", generate(ENDLESS, stream=stream), request_id=request_id)
    until(lambda: runs(server))
    return asking


def runs(server: Server) -> bool:
    return any(model["running"] for model in requests.get(server.url + "/api/ps", timeout=DEADLINE_S).json()["models"])


def generations(server: Server) -> float:
    """How many the worker has ended."""
    text = requests.get(server.url + "/metrics", timeout=DEADLINE_S).text
    return Scrape(text).value("rustllama_requests_total", model="toy")


def test_nginx_in_front_streaming(row: Row, upstream: Server, nginx: Nginx) -> None:
    tokens = times(1_000, 100)
    came_s, lines = [], []
    answer = nginx.ask("POST", "/api/generate", generate(tokens))
    for line in iter(answer.readline, b""):
        came_s.append(time.perf_counter())
        lines.append(json.loads(line))
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    row.is_at_least("lines of an answer", len(lines), 0.9 * tokens)
    share = (came_s[-1] - came_s[0]) * 1e9 / lines[-1]["eval_duration"]
    row.is_at_least("they came in that share of the time it took", share, 0.8)
    gaps_ms = [(later - sooner) * 1e3 for sooner, later in pairwise(came_s)]
    row.is_within("gap p99", percentile(gaps_ms, 0.99), 50)


@pytest.mark.parametrize("stream", [True, False])
def test_nginx_in_front_disconnect(row: Row, upstream: Server, nginx: Nginx, stream: bool) -> None:
    freed_ms = []
    for _ in range(DISCONNECTS):
        asking = computing(nginx, upstream, stream=stream)
        if stream:
            asking.getresponse().readline()
        left_s = time.perf_counter()
        nginx.hang_up()
        until(lambda: not runs(upstream))
        freed_ms.append((time.perf_counter() - left_s) * 1e3)
    row.is_within("slot free p95", percentile(freed_ms, 0.95), 300 if stream else 500)
    row.is_at_most("asked for again", generations(upstream) - DISCONNECTS, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_nginx_in_front_restart_of_the_worker(row: Row, upstream: Server, nginx: Nginx, stream: bool) -> None:
    ended_ms, back_ms = [], []
    for number in range(KILLS):
        asking = computing(nginx, upstream, stream=stream, request_id=f"killed-{number}")
        answer = _begun(asking) if stream else None
        killed_s = time.perf_counter()
        os.kill(upstream.worker_pid, signal.SIGKILL)
        _see_the_end(asking, answer)
        ended_ms.append((time.perf_counter() - killed_s) * 1e3)
        again = nginx.ask("POST", "/api/generate", generate(3, stream=False))
        assert (again.status, json.loads(again.read())["eval_count"]) == (200, 3)
        back_ms.append((time.perf_counter() - killed_s) * 1e3)
        assert generations(upstream) == 1, "the killed one was asked for again"
        nginx.hang_up()
    told = [line for line in upstream.log.read_text().splitlines() if "killed-" in line]
    row.is_at_least("deaths in the midst of a generation", sum(" died of SIGKILL" in line for line in told), KILLS)
    row.is_at_most("generations asked for again", len(told) - KILLS, 0)
    row.is_within("the client sees the end p95", percentile(ended_ms, 0.95), 1_000)
    row.is_within("the next answer p95", percentile(back_ms, 0.95), 3_000)


def _begun(asking: http.client.HTTPConnection) -> http.client.HTTPResponse:
    """Its first token is there."""
    answer = asking.getresponse()
    assert json.loads(answer.readline())["done"] is False
    return answer


def _see_the_end(asking: http.client.HTTPConnection, answer: http.client.HTTPResponse | None) -> None:
    """Of an answer that broke, or of one that never came."""
    if answer is not None:
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
    else:
        refused = asking.getresponse()
        assert (refused.status, refused.getheader("Retry-After")) == (503, "2")
