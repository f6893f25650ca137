"""A real server whose disk, database or model file fails: the request that meets it is told, and all others go on."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import gevent
import pytest
import requests

from rustllama.api.catalog import Catalog
from rustllama.core import FileIdentity
from rustllama.errors import Unavailable
from rustllama.model_files import ModelFiles
from rustllama.registry import Registry
from rustllama.settings import Settings
from tests.conftest import Server, start_server
from tests.disks import hanging
from tests.fakes import build_house, fake_record
from tests.test_database import spoil

DEADLINE_S = 60
Start = Callable[..., Server]


def ask(server: Server, method: str, path: str, body: object = None) -> requests.Response:
    return requests.request(method, server.url + path, json=body, timeout=DEADLINE_S)


def chat(server: Server, model: str = "demo") -> requests.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "options": {"num_predict": 3}}
    return ask(server, "POST", "/api/chat", body)


def create(server: Server, name: str, path: Path) -> requests.Response:
    return ask(server, "POST", "/api/create", {"name": name, "modelpath": str(path)})


def delete(server: Server, name: str) -> requests.Response:
    return ask(server, "DELETE", "/api/delete", {"name": name})


def listing(server: Server) -> dict[str, Any]:
    response = ask(server, "GET", "/api/list")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def under_way(server: Server) -> int:
    """Requests that have a slot or wait for one."""
    models = ask(server, "GET", "/api/ps").json()["models"]
    return sum(int(model["running"]) + int(model["queued"]) for model in models)


def good(response: requests.Response) -> None:
    assert response.status_code == 200, response.text


def error(response: requests.Response, status: int) -> str:
    assert response.status_code == status, response.text
    sentence = response.json()["error"]
    assert "Traceback" not in sentence
    return str(sentence)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers one after another; the state folder is `tmp_path / "home"`, or what the environment says."""
    started: list[Server] = []

    def start(**environ: str) -> Server:
        started.append(start_server(tmp_path / "home", environ=environ))
        return started[-1]

    yield start
    assert [server.stop() for server in started] == [0] * len(started)


@pytest.fixture
def own_server(start: Start) -> Server:
    return start()


def test_a_database_that_is_damaged_at_the_start_is_replaced_and_the_list_says_so(start: Start, tmp_path: Path) -> None:
    home = tmp_path / "home"
    start().stop()
    spoil(home / "rustllama.db")
    server = start()
    good(chat(server))
    (aside,) = home.glob("rustllama.db.corrupt-*-??????")
    (warning,) = listing(server)["warnings"]
    assert str(aside) in warning
    assert f"was damaged: it is {aside} now" in server.log.read_text()
    shown = subprocess.run(
        [sys.executable, "-m", "rustllama", "list"],
        env={**os.environ, "RUSTLLAMA_HOST": server.url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "demo" in shown.stdout
    assert shown.stderr == f"Warning: {warning}\n"
    aside.unlink()
    assert "warnings" not in listing(server)


def test_damage_that_is_met_while_running_is_an_error_until_the_next_start(start: Start) -> None:
    server = start()
    os.kill(server.worker_pid, signal.SIGKILL)
    for suffix in ("", "-wal"):  # the next worker opens them anew
        spoil(server.home / f"rustllama.db{suffix}")
    assert "is damaged; restart the server" in error(chat(server), 500)
    good(ask(server, "GET", "/health"))
    server.stop()
    good(chat(start()))


def test_models_to_load_are_looked_at_first_as_for_a_request(
    start: Start, tmp_path: Path, toys: dict[str, Path]
) -> None:
    first = start()
    gone, changed = (Path(shutil.copy(toys["llama"], tmp_path / name)) for name in ("gone.gguf", "changed.gguf"))
    good(create(first, "gone", gone))
    good(create(first, "changed", changed))
    before = {model["name"]: model["digest"] for model in listing(first)["models"]}
    assert first.stop() == 0
    gone.unlink()
    shutil.copy(toys["mamba"], changed)
    server = start(RUSTLLAMA_LOAD="gone,changed")
    assert f"--load gone: There is no file at {gone}" in server.log.read_text()
    (loaded,) = ask(server, "GET", "/api/ps").json()["models"]
    assert (loaded["name"], loaded["details"]["family"]) == ("changed:latest", "mamba")
    after = {model["name"]: model["digest"] for model in listing(server)["models"]}
    assert (after["changed"] == before["changed"], after["gone"] == before["gone"]) == (False, True)


def test_a_file_system_that_hangs_holds_up_nobody_else(
    own_server: Server, tmp_path: Path, toys: dict[str, Path]
) -> None:
    folder = tmp_path / "far"
    folder.mkdir()
    good(create(own_server, "toy", Path(shutil.copy(toys["llama"], folder / "model.gguf"))))
    with ThreadPoolExecutor(20) as clients:
        with hanging(folder):
            stuck = [clients.submit(chat, own_server, "toy") for _ in range(20)]
            assert (chat(own_server).status_code, len(listing(own_server)["models"])) == (200, 2)
            good(create(own_server, "other", toys["mamba"]))
            for request in stuck:
                assert f"{folder}/model.gguf does not answer" in error(request.result(), 503)
        good(chat(own_server, "toy"))


def test_a_file_that_does_not_answer_is_given_up_and_others_go_on(tmp_path: Path) -> None:
    """As with a real one, where nothing can be mounted."""
    house, go = build_house(tmp_path), threading.Event()
    house.registry.put(fake_record(tmp_path / "stuck.gguf", "stuck"))

    def identity(path: Path) -> FileIdentity:
        if path.name == "stuck.gguf":
            go.wait()
        return house.registry.get(path.stem).identity

    catalog = Catalog(
        Settings(), house.registry, house.manager, ModelFiles(Path("/nowhere")), identity=identity, patience_s=0.05
    )
    with pytest.raises(Unavailable, match=r"stuck\.gguf does not answer"):
        catalog.current("stuck")
    assert catalog.current("toy").name == "toy"
    go.set()


def test_who_wants_to_write_waits_no_longer_than_its_patience_for_those_who_do(tmp_path: Path) -> None:
    house, path = build_house(tmp_path), tmp_path / "rustllama.db"
    registry = Registry(path, bundled=tmp_path / "none.gguf", busy_timeout_s=0.5)
    catalog = Catalog(Settings(), registry, house.manager, ModelFiles(tmp_path / "blobs"), patience_s=0.05)

    def refusal() -> str:
        with pytest.raises(Unavailable) as caught:
            catalog.delete("toy")
        return str(caught.value)

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        writers = [gevent.spawn(refusal) for _ in range(2)]
        first, second = sorted(writer.get() for writer in writers)
    assert first == f"{path} is locked by another program; try again."
    assert second == "Other changes of the registry take long: try again."
