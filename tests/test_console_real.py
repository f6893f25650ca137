"""The console and the verbs against the real server: one that runs, and the private one."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rustllama.client import Client
from tests.conftest import Server, start_server
from tests.terminal import PATIENCE_S, Terminal, terminal

CTRL_C, CTRL_D = "\x03", "\x04"
PROMPT = "\n>>>"
NOWHERE = "127.0.0.1:9"

private_only = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux tells when a stranger's child ends")


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose models a test may change."""
    running = start_server(tmp_path_factory.mktemp("home"))
    yield running
    assert running.stop() == 0


def rustllama(url: str, home: Path, *arguments: str, stdin: str = "") -> str:
    """What the command prints."""
    environ = {**os.environ, "RUSTLLAMA_HOST": url, "RUSTLLAMA_HOME": str(home)}
    command = [sys.executable, "-m", "rustllama", *arguments]
    return subprocess.run(command, env=environ, input=stdin, stdout=subprocess.PIPE, text=True, check=True).stdout


def private_server_of(chat: Terminal) -> int:
    """The process id of the server that a console started."""
    return child_of(chat.process.pid)


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def wait_until_gone(pid: int) -> None:
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        assert select.select([process], [], [], PATIENCE_S)[0], "the private server goes on"
        os.close(process)


@pytest.fixture
def private_chat(tmp_path: Path) -> Iterator[Terminal]:
    with terminal("run", RUSTLLAMA_HOST=NOWHERE, RUSTLLAMA_HOME=str(tmp_path)) as chat:
        assert "a private one was started" in chat.wait_for(PROMPT)
        yield chat


def test_demo_answers_a_question(server: Server, tmp_path: Path) -> None:
    assert rustllama(server.url, tmp_path, "run", "demo", "why is the sky blue?").strip()


def test_demo_goes_on_with_a_conversation(server: Server, tmp_path: Path) -> None:
    with terminal("run", "demo", "--verbose", RUSTLLAMA_HOST=server.url, RUSTLLAMA_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
        for _ in range(2):
            chat.type("what can you do?\r")
            chat.wait_for("tokens/s")
            chat.wait_for(PROMPT)
        chat.type(CTRL_D)
        assert chat.wait_for_end() == 0


def test_a_model_is_registered_shown_loaded_stopped_and_removed(
    own_server: Server, tmp_path: Path, toys: dict[str, Path]
) -> None:
    url = own_server.url
    rustllama(url, tmp_path, "create", "toy", str(toys["llama"]))
    assert "toy" in rustllama(url, tmp_path, "list")
    assert str(toys["llama"]) in rustllama(url, tmp_path, "show", "toy")
    rustllama(url, tmp_path, "run", "toy", "hello")
    assert "toy" in rustllama(url, tmp_path, "ps")
    rustllama(url, tmp_path, "stop", "toy")
    assert "toy" not in rustllama(url, tmp_path, "ps")
    rustllama(url, tmp_path, "rm", "toy")
    assert "toy" not in rustllama(url, tmp_path, "list")


def test_ctrl_c_stops_the_servers_work(own_server: Server, tmp_path: Path, toys: dict[str, Path]) -> None:
    environ = {"RUSTLLAMA_HOST": own_server.url, "RUSTLLAMA_HOME": str(tmp_path)}
    with terminal("run", str(toys["gemma3"]), **environ) as chat:
        chat.wait_for(PROMPT)
        chat.type("go on for ever\r")
        client = Client(own_server.url)
        chat.wait_until(lambda: any(model.running for model in client.loaded()))
        chat.type(CTRL_C)
        chat.wait_for(PROMPT)
        chat.wait_until(lambda: not any(model.running for model in client.loaded()))
        chat.type(CTRL_D)
        assert chat.wait_for_end() == 0


@private_only
def test_the_private_server_is_out_of_reach_of_ctrl_c(tmp_path: Path, toys: dict[str, Path]) -> None:
    with terminal("run", str(toys["gemma3"]), RUSTLLAMA_HOST=NOWHERE, RUSTLLAMA_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
        server = private_server_of(chat)
        assert os.getpgid(server) == server
        chat.type("go on for ever\r")
        chat.wait_for("for ever\n")
        enough = len(chat.text) + 200
        chat.wait_until(lambda: len(chat.text) > enough)
        chat.type(CTRL_C)
        chat.wait_for(PROMPT)
        chat.type("/show\r")
        chat.wait_for("architecture")


@private_only
def test_the_private_server_ends_with_the_console(private_chat: Terminal) -> None:
    server = private_server_of(private_chat)
    private_chat.type(CTRL_D)
    assert private_chat.wait_for_end() == 0
    wait_until_gone(server)


@private_only
def test_the_private_server_ends_when_the_console_is_killed(private_chat: Terminal) -> None:
    server = private_server_of(private_chat)
    private_chat.process.send_signal(signal.SIGKILL)
    wait_until_gone(server)


@private_only
def test_the_private_server_ends_with_the_terminal(private_chat: Terminal) -> None:
    server = private_server_of(private_chat)
    private_chat.close()
    wait_until_gone(server)


@private_only
def test_where_the_private_server_was_killed_the_console_says_what_helps(private_chat: Terminal) -> None:
    server = private_server_of(private_chat)
    worker = child_of(server)
    os.killpg(server, signal.SIGKILL)
    for pid in (server, worker):
        wait_until_gone(pid)
    private_chat.type("hello\r")
    private_chat.wait_for("leave")
    private_chat.wait_for(PROMPT)
    assert "rustllama serve" not in private_chat.text


def test_a_private_server_answers_a_script(tmp_path: Path) -> None:
    assert rustllama(NOWHERE, tmp_path, "run", stdin="hello\n").strip()


def test_a_private_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    environ = {**os.environ, "RUSTLLAMA_HOST": NOWHERE, "RUSTLLAMA_HOME": str(tmp_path), "RUSTLLAMA_LOAD": "nope"}
    command = [sys.executable, "-m", "rustllama", "run", "demo", "hello"]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1)
    assert "did not start: RUSTLLAMA_LOAD" in found.stderr
