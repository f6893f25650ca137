"""Templates that are bombs, in the real server: it answers all others, and leaves no process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.conftest import Server, start_server
from tests.test_api_renderer import SLOW_ON_DEMAND
from tests.test_api_templates import PLAIN
from tests.test_serve import ask, post, until
from tests.test_template_helper import LOOP
from tests.toys import write_toy

BOMBS = (
    LOOP,
    "{{ 'a' * 10 ** 9 }}",
    "{% set x = namespace(t='a') %}{% for i in range(99) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Its models: `toy`, whose template is a stranger's, and `bomb`, whose template is slow when it is asked `slow`."""
    running = start_server(tmp_path / "home")
    for name, template in (("toy", PLAIN), ("bomb", SLOW_ON_DEMAND)):
        path = write_toy(tmp_path / f"{name}.gguf", chat_template=template)
        assert post(running, "/api/create", {"name": name, "modelpath": str(path)}).ok
    yield running
    assert running.stop() == 0


def bomb_of_a_request(server: Server, template: str) -> requests.Response:
    return post(server, "/api/generate", {"model": "toy", "prompt": "hello", "template": template, "stream": False})


def bomb_of_a_model(server: Server) -> requests.Response:
    return post(server, "/api/chat", {"model": "bomb", "messages": [{"role": "user", "content": "slow"}]})


def test_bombs_are_refused_while_others_are_answered(server: Server) -> None:
    worker = server.worker_pid
    assert ask(server, 3).json()["eval_count"] == 3
    with ThreadPoolExecutor(8) as clients:
        bombs = [clients.submit(bomb_of_a_request, server, template) for template in BOMBS]
        bombs += [clients.submit(bomb_of_a_model, server) for _ in range(2)]
        answers = list(clients.map(lambda _: ask(server, 3), range(8)))
    assert [answer.json().get("eval_count") for answer in answers] == [3] * 8
    assert [bomb.result().status_code for bomb in bombs] == [400] * 5
    assert all("template" in bomb.result().json()["error"] for bomb in bombs)
    assert server.worker_pid == worker


def test_a_template_that_says_nothing_is_refused(server: Server) -> None:
    refused = bomb_of_a_request(server, "{# nothing #}")
    assert (refused.status_code, "The prompt is empty" in refused.text) == (400, True)


def helpers(server: Server) -> list[int]:
    """The processes that the worker's threads have started."""
    tasks = Path(f"/proc/{server.worker_pid}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def state(pid: int) -> str:
    """The kernel's letter; Z is a process that has ended, whether or not somebody asks for its exit status."""
    try:
        return Path(f"/proc/{pid}/status").read_text().partition("\nState:\t")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def are_gone(pids: list[int]) -> bool:
    return all(state(pid) == "Z" for pid in pids)


def test_killed_helpers_are_replaced(server: Server) -> None:
    for _ in range(3):
        assert ask(server, 3).json()["eval_count"] == 3
        (helper,) = helpers(server)
        os.kill(helper, signal.SIGKILL)


def test_helpers_end_with_the_server(server: Server) -> None:
    assert ask(server, 1).ok
    assert bomb_of_a_request(server, "{{ messages }}").ok
    pids = helpers(server)
    assert len(pids) == 2
    server.stop()
    until(lambda: are_gone(pids))


@pytest.mark.parametrize("bombed", [False, True])
def test_helpers_end_with_a_worker_that_is_killed(server: Server, bombed: bool) -> None:
    assert ask(server, 1).ok
    assert bomb_of_a_request(server, "{{ messages }}").ok
    pids = helpers(server)
    with ThreadPoolExecutor(1) as clients:
        if bombed:
            clients.submit(bomb_of_a_request, server, LOOP)
            until(lambda: "R" in map(state, pids))
        os.kill(server.worker_pid, signal.SIGKILL)
    until(lambda: are_gone(pids))
    assert ask(server, 1).ok


def test_models_that_are_loaded_from_the_start_find_the_helper_started(server: Server) -> None:
    server.stop()
    again = start_server(server.home, "--load", "toy")
    until(lambda: len(helpers(again)) == 1)
    assert again.stop() == 0
