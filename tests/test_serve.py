"""The whole server in processes of its own: start, drain, death and recovery, clients that leave, many at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.conftest import Server, start_server
from tests.toys import LLAMA, write_toy

DEADLINE_S = 30
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "hello"}]}


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "did not come true in time"
        time.sleep(0.02)


def post(server: Server, path: str, body: object, **more: object) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=DEADLINE_S, **more)  # type: ignore[arg-type]


def ask(server: Server, tokens: int, **more: object) -> requests.Response:
    return post(server, "/api/chat", {**CHAT, "options": {"num_predict": tokens, "temperature": 0}, **more})


def stream(server: Server, tokens: int) -> requests.Response:
    """An answer that has begun: its first line is read."""
    body = {**CHAT, "stream": True, "options": {"num_predict": tokens, "temperature": 0}}
    return post(server, "/api/chat", body, stream=True)


def lines(response: requests.Response) -> list[dict[str, object]]:
    return [json.loads(line) for line in response.iter_lines()]


def loaded(server: Server) -> dict[str, Any]:
    """The first row of /api/ps."""
    row: dict[str, Any] = requests.get(server.url + "/api/ps", timeout=DEADLINE_S).json()["models"][0]
    return row


@pytest.fixture(scope="module")
def slow_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that takes some milliseconds a token, so that there is a middle of an answer."""
    folder = tmp_path_factory.mktemp("slow")
    return write_toy(folder / "slow.gguf", LLAMA, width=256, layers=6, heads=8, feed_forward=1024, vocabulary=2048)


def started(home: Path, toy: Path, *arguments: str, **environ: str) -> Server:
    server = start_server(home, *arguments, environ=environ)
    assert post(server, "/api/create", {"name": "toy", "modelpath": str(toy)}).json() == {"status": "success"}
    return server


@pytest.fixture
def toy_server(tmp_path: Path, slow_toy: Path) -> Iterator[Server]:
    server = started(tmp_path / "home", slow_toy)
    yield server
    assert server.stop() == 0


def serve_fails(*arguments: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rustllama", "serve", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_ready_means_an_address_a_count_and_a_command(tmp_path: Path) -> None:
    server = start_server(tmp_path / "home")
    assert server.process.stdout is not None
    assert "rustllama run" in server.process.stdout.readline()
    assert requests.get(server.url + "/health", timeout=5).json() == {"status": "ok"}
    assert server.stop() == 0


def test_localhost_is_both_loopbacks(tmp_path: Path) -> None:
    server = start_server(tmp_path / "home", environ={"RUSTLLAMA_HOST": "localhost:0"})
    port = server.url.rpartition(":")[2]
    hosts = ["127.0.0.1", "localhost", *(["[::1]"] if _has_ipv6() else [])]
    assert [requests.get(f"http://{host}:{port}/health", timeout=5).status_code for host in hosts] == [200] * len(hosts)
    assert server.stop() == 0


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        return True
    except OSError:
        return False


def test_a_port_in_use_is_one_line_and_status_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = serve_fails(RUSTLLAMA_HOST=f"127.0.0.1:{port}", RUSTLLAMA_HOME=str(tmp_path))
    assert f"port {port}" in line
    assert "--port" in line


def test_a_bad_setting_is_named(tmp_path: Path) -> None:
    assert "RUSTLLAMA_WORKERS='many'" in serve_fails(RUSTLLAMA_WORKERS="many", RUSTLLAMA_HOME=str(tmp_path))


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "RUSTLLAMA_HOME" in serve_fails(RUSTLLAMA_HOME=str(tmp_path / "file" / "home"))


def test_a_model_to_load_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nosuch" in serve_fails("--load", "nosuch", RUSTLLAMA_HOME=str(tmp_path), RUSTLLAMA_HOST="127.0.0.1:0")


def test_load_has_the_model_ready_before_the_first_request(tmp_path: Path, slow_toy: Path) -> None:
    assert started(tmp_path / "home", slow_toy).stop() == 0
    server = start_server(tmp_path / "home", "--load", "toy")
    assert loaded(server)["name"] == "toy:latest"
    assert server.stop() == 0


def test_streams_that_outlast_the_drain_get_a_terminal_event(tmp_path: Path, slow_toy: Path) -> None:
    server = started(tmp_path / "home", slow_toy, RUSTLLAMA_DRAIN_TIMEOUT="0.2")
    response = stream(server, 2000)
    server.process.send_signal(signal.SIGTERM)
    assert "shutting down" in str(lines(response)[-1]["error"])
    assert server.stop() == 0


def test_an_answer_whose_time_is_up_ends_with_what_it_has_in_either_dialect(tmp_path: Path, slow_toy: Path) -> None:
    server = started(tmp_path / "home", slow_toy, RUSTLLAMA_REQUEST_TIMEOUT="300ms")
    ends: list[dict[str, Any]] = [ask(server, 2000).json(), lines(stream(server, 2000))[-1]]
    assert [(end["done"], end["done_reason"]) for end in ends] == [(True, "length")] * 2
    assert all("time limit" in end["warnings"][-1] and end["eval_count"] < 2000 for end in ends)
    reply = post(server, "/v1/chat/completions", {**CHAT, "max_tokens": 2000}).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert "time limit" in reply["warnings"][-1]
    assert server.stop() == 0


def test_new_requests_are_refused_while_draining(tmp_path: Path, slow_toy: Path) -> None:
    server = started(tmp_path / "home", slow_toy)
    with requests.Session() as kept_alive:
        assert kept_alive.get(server.url + "/health", timeout=5).status_code == 200
        running = stream(server, 300)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: kept_alive.get(server.url + "/health", timeout=5).status_code == 503)
    with pytest.raises(requests.ConnectionError):
        ask(server, 1)
    running.close()
    assert server.stop() == 0


def test_a_second_interrupt_ends_at_once(tmp_path: Path, slow_toy: Path) -> None:
    server = started(tmp_path / "home", slow_toy)
    response = stream(server, 2000)
    server.process.send_signal(signal.SIGINT)
    until(lambda: "stopping: 1 running" in server.log.read_text())
    until(lambda: not _listens(server))
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        lines(response)
    assert server.stop() == 0


def _listens(server: Server) -> bool:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_a_private_server_ends_when_its_input_closes(tmp_path: Path) -> None:
    environ = {
        **os.environ,
        "RUSTLLAMA_HOME": str(tmp_path),
        "RUSTLLAMA_HOST": "127.0.0.1:0",
        "RUSTLLAMA_STOP_ON_EOF": "1",
    }
    command = [sys.executable, "-m", "rustllama", "serve"]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"ready" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(timeout=DEADLINE_S) == 0


def test_an_answer_that_shifts_outgrows_its_context(tmp_path: Path, toys: dict[str, Path]) -> None:
    server = started(tmp_path / "home", toys["llama"], RUSTLLAMA_NUM_CTX="256")
    options = {"num_ctx": 64, "num_predict": 3 * 64, "temperature": 0}
    for path, asked in (("/api/chat", CHAT), ("/api/generate", {"model": "toy", "prompt": "hello", "raw": True})):
        reply = post(server, path, {**asked, "shift": True, "options": options}).json()
        assert (reply["eval_count"], reply["done_reason"]) == (3 * 64, "length")
        assert "tokens were dropped" in reply["warnings"][-1]
        ended = post(server, path, {**asked, "options": options}).json()
        assert ended["prompt_eval_count"] + ended["eval_count"] == 64
    assert server.stop() == 0


def test_what_was_acknowledged_survives_a_kill_of_everything(tmp_path: Path, slow_toy: Path) -> None:
    server = started(tmp_path / "home", slow_toy)
    os.kill(server.worker_pid, signal.SIGKILL)
    server.process.kill()
    server.stop()
    again = start_server(tmp_path / "home")
    names = [model["name"] for model in requests.get(again.url + "/api/list", timeout=5).json()["models"]]
    assert "toy" in names
    assert again.stop() == 0


@pytest.mark.parametrize("killed", [False, True])
def test_a_conversation_goes_on_where_it_was_after_a_restart(tmp_path: Path, slow_toy: Path, killed: bool) -> None:
    home, environ = tmp_path / "home", {"RUSTLLAMA_PROMPT_CACHE_DISK": "1GiB"}
    server, turns = started(home, slow_toy, **environ), [{"role": "user", "content": "hello, " * 50}]
    first = ask(server, 20, messages=turns).json()
    if killed:
        post(server, "/api/chat", {"model": "toy", "keep_alive": 0})
        until(lambda: list((home / "prompts").glob("*.state")) != [])
        os.kill(server.worker_pid, signal.SIGKILL)
        server.process.kill()
    server.stop()
    again = start_server(home, environ=environ)
    turns += [first["message"], {"role": "user", "content": "and now?"}]
    assert ask(again, 5, messages=turns).json()["prompt_eval_cached_count"] >= first["prompt_eval_count"] > 64
    assert again.stop() == 0


def test_clients_that_leave_in_the_middle_leave_nothing_behind(toy_server: Server) -> None:
    """A tenth of the thousand that `rustllama bench --leave 1000` makes."""
    stream(toy_server, 5).content  # noqa: B018 - the model and the threads are there now
    threads, sockets = resources(toy_server)

    def leave(_: int) -> None:
        response = stream(toy_server, 1000)
        next(response.iter_content(1))
        response.close()

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(leave, range(100)))
    until(lambda: loaded(toy_server)["running"] + loaded(toy_server)["queued"] == 0)
    until(lambda: resources(toy_server)[0] <= threads and resources(toy_server)[1] <= sockets)


def resources(server: Server) -> tuple[int, int]:
    """Threads and sockets of the worker."""
    process = Path(f"/proc/{server.worker_pid}")
    sockets = sum(_is_socket(fd) for fd in (process / "fd").iterdir())
    return len(list((process / "task").iterdir())), sockets


def _is_socket(fd: Path) -> bool:
    try:
        return os.readlink(fd).startswith("socket:")
    except FileNotFoundError:  # it was closed since the folder was read
        return False


@pytest.mark.parametrize(
    ("head", "status"), [(b"hello\r\n\r\n", 400), (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 414)]
)
def test_what_is_not_http_gets_json(server: Server, head: bytes, status: int) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])


def test_the_log_has_a_line_for_each_request_and_no_words_of_it(toy_server: Server) -> None:
    answer = ask(toy_server, 7).json()["message"]["content"]
    until(lambda: "answer_tokens=7" in toy_server.log.read_text())
    log = toy_server.log.read_text()
    assert "model=toy" in log
    assert "hello" not in log
    assert answer.strip() not in log


def test_two_models_answer_at_the_same_time(toy_server: Server, toys: dict[str, Path]) -> None:
    post(toy_server, "/api/create", {"name": "other", "modelpath": str(toys["mamba"])})
    with ThreadPoolExecutor(8) as clients:
        names = ["toy", "other"] * 4
        answers = list(clients.map(lambda name: ask(toy_server, 20, model=name).json()["eval_count"], names))
    assert answers == [20] * 8
