"""A client that leaves makes room at once, whatever its request was doing: the next one in the queue gets its slot."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.hazards import times
from tests.hazards.conftest import Start
from tests.hazards.crowd import Reply, chat, connected, prompts_begun, request, serving
from tests.hazards.table import Row, percentile
from tests.test_serve import loaded, until
from tests.toys import LLAMA, write_toy

LEAVING = times(100, 8)
LONG_PROMPT = "a b c d e f g h " * 950
SHORT = chat(1, stream=False)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It takes seconds for an answer or a prompt as long as its context."""
    folder = tmp_path_factory.mktemp("slow")
    changes = {"width": 256, "layers": 6, "heads": 8, "feed_forward": 1024, "context_length": 8192}
    return write_toy(folder / "slow.gguf", LLAMA, **changes)


def streaming(server: Server) -> socket.socket:
    """A client that has begun to read."""
    client = connected(server, request(server, chat(5000)))
    client.recv(4096)
    return client


def in_its_prompt(server: Server) -> socket.socket:
    client = connected(server, request(server, chat(1, f"{time.perf_counter_ns()} {LONG_PROMPT}")))
    until(lambda: loaded(server)["running"] == 1)
    return client


def not_streamed(server: Server) -> socket.socket:
    """A client whose answer has begun, of which it sees nothing yet."""
    before = prompts_begun(server)
    client = connected(server, request(server, chat(5000, stream=False)))
    until(lambda: prompts_begun(server) > before)
    return client


@pytest.mark.parametrize(
    ("arrive", "limit_ms", "prompts"), [(streaming, 300, 1), (in_its_prompt, 500, 0), (not_streamed, 500, 1)]
)
def test_disconnect(
    row: Row, start: Start, toy: Path, arrive: Callable[[Server], socket.socket], limit_ms: int, prompts: int
) -> None:
    """`prompts` of each request get their first token."""
    server = serving(start, toy, SLOTS=1, PROMPT_CACHE_MEMORY=0)
    before, free_ms = prompts_begun(server), list[float]()
    for _ in range(LEAVING):
        client = arrive(server)
        waiting = connected(server, request(server, SHORT))
        until(lambda: loaded(server)["queued"] == 1)
        began_s = time.perf_counter()
        client.close()
        with waiting:
            assert Reply.to(waiting).lines[-1]["eval_count"] == 1
        free_ms.append((time.perf_counter() - began_s) * 1e3)
    row.is_at_least("clients that left", len(free_ms), LEAVING)
    row.is_within("the next one is answered, p95", percentile(free_ms, 0.95), limit_ms)
    assert prompts_begun(server) - before == (prompts + 1) * LEAVING, "they left too late"
    assert server.log.read_text().count(" POST /api/chat 499 ") == LEAVING
    assert loaded(server)["running"] == loaded(server)["queued"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_in_the_queue(row: Row, start: Start, toy: Path, stream: bool) -> None:
    server = serving(start, toy, SLOTS=1, PROMPT_CACHE_MEMORY=0)
    before = prompts_begun(server)
    running = connected(server, request(server, chat(5000)))
    until(lambda: loaded(server)["running"] == 1)
    queued = [connected(server, request(server, chat(1, stream=stream))) for _ in range(LEAVING)]
    until(lambda: loaded(server)["queued"] == LEAVING)
    began_s = time.perf_counter()
    for client in queued:
        client.close()
    until(lambda: loaded(server)["queued"] == 0)
    row.is_within(f"{LEAVING} places free", (time.perf_counter() - began_s) * 1e3, 500)
    running.close()
    until(lambda: loaded(server)["running"] == 0)
    row.is_at_most("that ran", prompts_begun(server) - before - 1, 0)
