"""`rustllama pull`, and `run` with a source, as a new user meets them: on a terminal or not, with a network or not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, hosting, stall
from tests.hub import publish
from tests.stand_in import StandIn, model, stand_in
from tests.terminal import terminal
from tests.toys import CHATML, write_toy

CTRL_C, CTRL_D = "\x03", "\x04"
NOWHERE = "127.0.0.1:9"
SOURCE = "hf.co/user/toy-GGUF"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Host]:
    body = write_toy(tmp_path / "toy.gguf", chat_template=CHATML).read_bytes()
    with hosting() as host:
        publish(host, "user/toy-GGUF", {"toy-Q4_K_M.gguf": body})
        host.files["/toy.gguf"] = body
        yield host


@pytest.fixture
def fake() -> Iterator[StandIn]:
    with stand_in() as found:
        yield found


def rustllama(home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rustllama", *arguments],
        env={**os.environ, "RUSTLLAMA_HOME": str(home), "RUSTLLAMA_HOST": NOWHERE, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_pull_that_is_stopped_goes_on_where_it_was(hub: Host, tmp_path: Path) -> None:
    size = len(hub.files["/toy.gguf"])
    hub.faulty = "/resolve/"
    hub.faults.append(stall(size * 4 // 10))
    environ = {"RUSTLLAMA_HOST": NOWHERE, "RUSTLLAMA_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    with terminal("pull", SOURCE, "toy", **environ) as screen:
        screen.wait_for("40%")
        screen.type(CTRL_C)
        assert screen.wait_for_end() == 130
        assert f"`rustllama pull {SOURCE} toy` goes on" in screen.text
    done = rustllama(tmp_path / "home", "pull", SOURCE, "toy", HF_ENDPOINT=hub.url)
    assert done.stdout == "Pulled toy: chat with `rustllama run toy`.\n", done.stderr
    assert hub.sent_bytes < 1.2 * size


def test_run_asks_fetches_and_chats(hub: Host, tmp_path: Path) -> None:
    environ = {"RUSTLLAMA_HOST": NOWHERE, "RUSTLLAMA_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    with terminal("run", SOURCE, **environ) as screen:
        screen.wait_for(f"{SOURCE} is not here yet: fetch it? [Y/n]")
        screen.type("\r")
        screen.wait_for(f"This is {SOURCE}.")
        screen.wait_for("\n>>>")
        screen.type(CTRL_D)
        assert screen.wait_for_end() == 0


def test_run_does_not_ask_a_script(fake: StandIn, tmp_path: Path) -> None:
    done = rustllama(tmp_path, "run", SOURCE, "hello", RUSTLLAMA_HOST=fake.url)
    assert done.stderr == f"Error: There is no model {SOURCE} yet: `rustllama pull {SOURCE}` fetches it.\n"


def test_run_finds_what_was_pulled_from_there_under_another_name(fake: StandIn, tmp_path: Path) -> None:
    fake.models(model("mine", origin=f"{SOURCE}:Q4_K_M"))
    rustllama(tmp_path, "run", f"{SOURCE}:q4_k_m", "hello", RUSTLLAMA_HOST=fake.url)
    assert [body["model"] for body in fake.bodies("POST /api/chat")] == ["mine"]


def test_without_a_terminal_there_are_plain_lines(fake: StandIn, tmp_path: Path) -> None:
    lines = [b'{"status":"pulling manifest"}\n']
    lines += [b'{"status":"pulling abc","total":1000,"completed":%d}\n' % done for done in range(0, 1001, 10)]
    fake.answers["POST /api/pull"] = lambda body: [*lines, b'{"status":"success","model":"m\\u001b[2J"}\n']
    done = rustllama(tmp_path, "pull", SOURCE, RUSTLLAMA_HOST=fake.url)
    told = done.stderr.splitlines()
    assert (told[0], told[1], told[-2], told[-1]) == (
        "pulling manifest",
        "pulling abc: 0 % of 1.0 KB",
        "pulling abc: 100 % of 1.0 KB",
        "success",
    )
    assert len(told) == 13  # eleven of the file
    assert "\x1b" not in done.stdout


def test_an_error_is_the_last_line(fake: StandIn, tmp_path: Path) -> None:
    fake.answers["POST /api/pull"] = lambda body: [b'{"status":"pulling manifest"}\n', b'{"error":"It is gone."}\n']
    done = rustllama(tmp_path, "pull", SOURCE, RUSTLLAMA_HOST=fake.url)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "Error: It is gone.")


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path) -> None:
    done = rustllama(tmp_path, "pull", SOURCE, HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: 127.0.0.1:1 cannot be reached: see whether this machine")
