"""Workers of a real server that die: nobody is left hanging, the next one serves, and the log says of what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
import requests

from tests.conftest import Server, start_server
from tests.terminal import terminal
from tests.test_serve import ask, lines, post, slow_toy, started, stream, until
from tests.toys import write_toy

__all__ = ["slow_toy"]  # a fixture

DEADLINE_S = 30
PROMPT = "\n>>>"


@pytest.fixture
def toy_server(tmp_path: Path, slow_toy: Path) -> Iterator[Server]:
    server = started(tmp_path / "home", slow_toy)
    yield server
    assert server.stop() == 0


def request_id(response: requests.Response) -> str:
    return response.headers["X-Request-Id"]


def kill(server: Server, sign: signal.Signals) -> None:
    """Returns when another worker is there."""
    worker = server.worker_pid
    os.kill(worker, sign)
    until(lambda: f"worker {worker} died of {sign.name}" in server.log.read_text())
    until(lambda: _next_worker(server) not in (None, worker))


def _next_worker(server: Server) -> int | None:
    try:
        return server.worker_pid
    except IndexError:  # between two
        return None


def load(server: Server) -> None:
    """Without a token."""
    assert post(server, "/api/chat", {"model": "toy", "messages": []}).json()["done_reason"] == "load"


def crash_in_loads(server: Server, sign: signal.Signals) -> requests.Response:
    """The answer to whoever comes after two of them."""
    for _ in range(2):
        load(server)
        kill(server, sign)
    return ask(server, 3)


def spoil(toy: Path) -> None:
    """From now on llama.cpp dies of the file, which looks as it did when it was proved."""
    key = b"llama.block_count" + (4).to_bytes(4, "little")  # a number of four bytes
    place, times = toy.read_bytes().index(key) + len(key), toy.stat()
    with toy.open("r+b") as file:
        file.seek(place)
        file.write((100_000).to_bytes(4, "little"))
    os.utime(toy, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("sign", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_ends_the_streams_and_nothing_else(toy_server: Server, sign: signal.Signals) -> None:
    streams = [stream(toy_server, 2000) for _ in range(3)]
    kill(toy_server, sign)
    for response in streams:
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            lines(response)
    names = [model["name"] for model in requests.get(toy_server.url + "/api/list", timeout=DEADLINE_S).json()["models"]]
    assert "toy" in names
    assert ask(toy_server, 3).json()["eval_count"] == 3


def test_the_log_has_the_model_and_the_requests_of_a_crash(toy_server: Server) -> None:
    streams = [stream(toy_server, 2000) for _ in range(2)]
    kill(toy_server, signal.SIGSEGV)
    (line,) = [line for line in toy_server.log.read_text().splitlines() if " died of " in line]
    assert ' died of SIGSEGV in model "toy" while computing for requests ' in line
    assert all(request_id(response) in line for response in streams)


def test_a_model_that_crashes_twice_before_its_first_token_is_in_quarantine_until_it_is_created_again(
    toy_server: Server, slow_toy: Path
) -> None:
    refused = crash_in_loads(toy_server, signal.SIGABRT)
    assert (refused.status_code, "quarantine" in refused.json()["error"]) == (503, True), refused.text
    assert int(refused.headers["Retry-After"]) > 500
    assert 'model "toy" is in quarantine' in toy_server.log.read_text()
    post(toy_server, "/api/create", {"name": "again", "modelpath": str(slow_toy)})
    assert ask(toy_server, 3).json()["eval_count"] == 3


def test_a_changed_file_is_out_of_quarantine(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy.gguf")
    server = started(tmp_path / "home", toy)
    assert crash_in_loads(server, signal.SIGSEGV).status_code == 503
    write_toy(toy, seed=2)
    assert ask(server, 3).json()["eval_count"] == 3
    assert server.stop() == 0


def test_a_kill_is_not_the_models_fault(toy_server: Server) -> None:
    assert crash_in_loads(toy_server, signal.SIGKILL).json()["eval_count"] == 3


def test_a_model_that_computed_is_not_to_blame_for_what_comes_later(toy_server: Server) -> None:
    for _ in range(2):
        assert ask(toy_server, 1).ok
        kill(toy_server, signal.SIGSEGV)
    assert ask(toy_server, 3).json()["eval_count"] == 3


def test_the_console_goes_on_with_its_conversation(toy_server: Server, tmp_path: Path) -> None:
    with terminal("run", "toy", RUSTLLAMA_HOST=toy_server.url, RUSTLLAMA_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
        chat.type("/set parameter num_predict 2000\r")
        chat.wait_for(PROMPT)
        chat.type("go on for ever\r")
        chat.wait_for("for ever\n")
        enough = len(chat.text) + 100
        chat.wait_until(lambda: len(chat.text) > enough)
        kill(toy_server, signal.SIGSEGV)
        assert "Error: The connection to" in chat.wait_for(PROMPT)
        chat.type("/set parameter num_predict 3\r")
        chat.wait_for(PROMPT)
        chat.type("/set verbose\r")
        chat.wait_for(PROMPT)
        chat.type("\x1b[A\x1b[A\x1b[A")  # what was asked before the commands
        chat.wait_for("go on for ever")
        chat.type("\r")
        assert "answer 3 tokens" in chat.wait_for(PROMPT)


def test_workers_that_cannot_start_are_tried_later_and_later_and_end_the_start(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    paths = [str(tmp_path), str(Path(__file__).parent.parent)]
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RUSTLLAMA_HOME": str(tmp_path),
        "RUSTLLAMA_HOST": "127.0.0.1:0",
    }
    command = [sys.executable, "-m", "rustllama", "serve"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout) == (3, "")
    deaths = [line for line in done.stderr.splitlines() if "died of SIGILL before it served" in line]
    moments = [datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") for line in deaths]
    waits_s = [(later - sooner).total_seconds() for sooner, later in pairwise(moments)]
    assert (len(deaths), waits_s[1] >= 0.5, waits_s[2] >= 1) == (4, True, True), waits_s
    assert "no worker could start" in done.stderr


def test_a_model_to_load_that_kills_the_worker_does_not_keep_the_server_down(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy.gguf")
    assert started(tmp_path / "home", toy).stop() == 0
    spoil(toy)
    server = start_server(tmp_path / "home", "--load", "toy")
    deaths = [line for line in server.log.read_text().splitlines() if " died of " in line]
    assert len(deaths) == 2
    assert all('died of SIGABRT while model "toy" was loading: ' in line and "GGML_ASSERT" in line for line in deaths)
    assert "quarantine" in ask(server, 1).json()["error"]
    assert ask(server, 1, model="demo").ok
    refused = post(server, "/api/create", {"name": "toy", "modelpath": str(toy)})
    assert refused.status_code == 400, "it is proved again"
    assert server.stop() == 0
