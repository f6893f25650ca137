"""Workers that die, leave or take long: what can end does, nobody hangs, and nothing that was promised is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.conftest import Server, start_server
from tests.hazards import times
from tests.hazards.conftest import Start, integrity
from tests.hazards.table import Row
from tests.scrape import Scrape
from tests.test_degraded import ask, chat, create, delete, good, listing, under_way
from tests.test_serve import CHAT, lines, post, slow_toy, stream, until
from tests.toys import LLAMA, write_toy

__all__ = ["slow_toy"]  # a fixture

KILLS = times(20, 3)
CREATES = 8  # around each kill
SHORT, STREAM_S = times(300, 30), times(5, 0)  # tokens; what a stream takes at least
STREAMS, STREAM = 50, times(100, 20)  # tokens
IMPATIENCE_S = 3
IMPATIENT = f"""
from rustllama import gunicorn_conf
from rustllama.cli import main

gunicorn_conf.timeout = {IMPATIENCE_S}
main()
"""


@dataclass(frozen=True, slots=True)
class Kill:
    """What came of one: seconds from it to these answers, and the models whose creation was acknowledged."""

    list_s: float
    chat_s: float  # without the load
    acknowledged: set[str]


def test_kill_9_of_the_worker_mid_stream(row: Row, start: Start, slow_toy: Path) -> None:
    server = start()
    good(create(server, "toy", slow_toy))
    kills = [_kill(server, slow_toy, number) for number in range(KILLS)]
    acknowledged = {name for kill in kills for name in kill.acknowledged}
    row.is_within("list", 1e3 * max(kill.list_s for kill in kills), 2_000)
    row.is_within("chat without its load", 1e3 * max(kill.chat_s for kill in kills), 3_000)
    row.is_at_least("creates acknowledged", len(acknowledged), KILLS)
    row.is_at_most("of them lost", len(acknowledged - {model["name"] for model in listing(server)["models"]}), 0)
    row.is_at_most("other deaths", server.log.read_text().count(" died of ") - KILLS, 0)
    assert integrity(server) == "ok"


def _kill(server: Server, toy: Path, number: int) -> Kill:
    """In the middle of two streams and some creates."""
    streams = [stream(server, 2000) for _ in range(2)]
    with ThreadPoolExecutor(2) as clients:
        creates = [clients.submit(_created, server, f"toy{number}-{each}", toy) for each in range(CREATES)]
        wait(creates, return_when=FIRST_COMPLETED)
        began_s = time.perf_counter()
        os.kill(server.worker_pid, signal.SIGKILL)
        for response in streams:
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                lines(response)
        listing(server)
        list_s = time.perf_counter() - began_s
        load_s = chat(server, "toy").json()["load_duration"] / 1e9
        chat_s = time.perf_counter() - began_s - load_s
    return Kill(list_s, chat_s, {create.result() for create in creates} - {""})


def _created(server: Server, name: str, toy: Path) -> str:
    """The name, or "" where the worker died meanwhile."""
    try:
        good(create(server, name, toy))
    except requests.ConnectionError:
        return ""
    return name


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_graceful_stop_with_4_streams_of_5_s(row: Row, tmp_path: Path, slow_toy: Path, sign: signal.Signals) -> None:
    server = start_server(tmp_path / "home", environ={"RUSTLLAMA_SPECULATION": "0"})
    good(create(server, "toy", slow_toy))
    token_s = max(answer[-1]["eval_duration"] for answer in _four(server, SHORT)) / SHORT / 1e9
    tokens = max(SHORT, int(1.2 * STREAM_S / token_s))
    began_s = time.perf_counter()
    answers = _four(server, tokens, lambda: server.process.send_signal(sign))
    row.is_within("streams after the signal", time.perf_counter() - began_s, 30, " s")
    row.is_at_least("the shortest", min(answer[-1]["eval_duration"] for answer in answers) / 1e9, STREAM_S, " s")
    row.is_at_least("streams with all tokens", sum(answer[-1]["eval_count"] == tokens for answer in answers), 4)
    row.is_at_most("exit status", server.stop(), 0)


def _four(server: Server, tokens: int, then: Callable[[], object] = lambda: None) -> list[list[dict[str, Any]]]:
    """Their lines; `then` is called when they all have begun."""
    body = {**CHAT, "stream": True, "shift": True, "options": {"num_predict": tokens, "temperature": 0}}
    streams = [post(server, "/api/chat", body, stream=True) for _ in range(4)]
    then()
    with ThreadPoolExecutor(4) as clients:
        return list(clients.map(lines, streams))


def test_native_work_longer_than_the_worker_timeout(row: Row, start: Start, tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy.gguf", LLAMA, width=512, layers=6, feed_forward=2048, context_length=8_000)
    server = start("serve", program=("-c", IMPATIENT), NUM_BATCH=8192, NUM_CTX=8_000, NUM_THREAD=1)
    good(create(server, "toy", toy))
    worker, slowest_s = server.worker_pid, 0.0
    with ThreadPoolExecutor(1) as clients:
        body = {"model": "toy", "prompt": "a " * 7_000, "raw": True, "options": {"num_predict": 1}}
        answer = clients.submit(post, server, "/api/generate", body)
        while not answer.done():
            slowest_s = max(slowest_s, requests.get(f"{server.url}/api/version", timeout=60).elapsed.total_seconds())
    good(answer.result())
    worked_s = Scrape(ask(server, "GET", "/metrics").text).value("rustllama_compute_seconds_total", work="prompt")
    row.is_at_least("one call of llama.cpp", worked_s, IMPATIENCE_S + 1, " s")
    row.is_within("/api/version meanwhile", 1e3 * slowest_s, 1_000)
    row.is_at_most("workers that were ended", abs(server.worker_pid - worker), 0)


def test_keep_alive_0_and_delete_during_50_streams(row: Row, start: Start, slow_toy: Path) -> None:
    server, rounds = start(), 0
    good(create(server, "toy", slow_toy))
    worker = server.worker_pid
    with ThreadPoolExecutor(STREAMS) as clients:
        answers = [clients.submit(lambda: lines(stream(server, STREAM))) for _ in range(STREAMS)]
        until(lambda: under_way(server) == STREAMS)
        while not all(answer.done() for answer in answers):
            good(post(server, "/api/chat", {"model": "toy", "keep_alive": 0}))
            good(delete(server, "toy"))
            good(create(server, "toy", slow_toy))
            good(chat(server, "toy"))
            rounds += 1
    ends = [answer.result()[-1] for answer in answers]
    row.is_at_least("rounds of it", rounds, 1)
    row.is_at_least("streams with all tokens", sum(end.get("eval_count") == STREAM for end in ends), STREAMS)
    row.is_at_most("crashes", server.log.read_text().count(" died of ") + (server.worker_pid != worker), 0)
