"""Disks, databases and model files that fail: the request that meets it is told, all others go on, and it heals."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import requests

from tests.conftest import Server, start_server
from tests.disks import Disk
from tests.hazards import times
from tests.hazards.conftest import Start, integrity
from tests.hazards.table import Row
from tests.test_degraded import ask, chat, create, delete, error, good, listing
from tests.test_serve import lines, slow_toy, stream, until

__all__ = ["slow_toy"]  # a fixture

CLIENTS, CHANGES = 8, times(200, 10)
HANG_MS = 1_000


def test_a_full_disk(row: Row, disk: Disk, start: Start, toys: dict[str, Path]) -> None:
    server = start(HOME=disk.path, PROMPT_CACHE_DISK="1GiB")
    disk.fill()
    good(chat(server))
    refused = create(server, "toy", toys["llama"])
    assert f"disk that holds {disk.path}/rustllama.db is full" in error(refused, 507)
    good(ask(server, "POST", "/api/chat", {"model": "demo", "keep_alive": 0}))  # writes its state
    good(chat(server))
    assert [model["name"] for model in listing(server)["models"]] == ["demo"]
    disk.clear()
    good(create(server, "toy", toys["llama"]))
    row.is_within("507 after", _ms(refused), HANG_MS)


def test_a_read_only_disk(row: Row, disk: Disk, start: Start, toys: dict[str, Path]) -> None:
    home = {"RUSTLLAMA_HOME": str(disk.path), "RUSTLLAMA_PROMPT_CACHE_DISK": "1MB"}
    assert start_server(disk.path, environ=home).stop() == 0
    disk.remount("ro")
    server = start(HOME=disk.path, PROMPT_CACHE_DISK="1MB")
    good(chat(server))
    refused = create(server, "toy", toys["llama"])
    assert f"{disk.path}/rustllama.db cannot be written" in error(refused, 500)
    assert [model["name"] for model in listing(server)["models"]] == ["demo"]
    disk.remount("rw")
    good(create(server, "toy", toys["llama"]))
    good(chat(server, "toy"))
    row.is_within("500 after", _ms(refused), HANG_MS)


def test_a_locked_database(row: Row, start: Start, toys: dict[str, Path]) -> None:
    server = start()
    good(chat(server))
    path = server.home / "rustllama.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other, ThreadPoolExecutor(12) as clients:
        other.execute("BEGIN EXCLUSIVE")
        writes = [clients.submit(delete, server, "demo") for _ in range(12)]
        reads = [chat(server), ask(server, "GET", "/api/list"), ask(server, "GET", "/health")]
        assert not any(write.done() for write in writes)  # or all threads would be theirs
        for write in writes:
            assert "try again" in error(write.result(), 503)
            assert write.result().headers["Retry-After"]
        other.execute("ROLLBACK")
    assert [read.status_code for read in reads] == [200] * 3
    good(create(server, "toy", toys["llama"]))
    good(delete(server, "demo"))
    row.is_within("reads meanwhile", max(map(_ms, reads)), HANG_MS)
    row.is_within("503 after", max(_ms(write.result()) for write in writes), 11_000)


def test_4_workers_8_clients_create_and_delete_one_name(row: Row, start: Start, toys: dict[str, Path]) -> None:
    server = start(WORKERS=4)
    good(create(server, "toy", toys["llama"]))

    def change(number: int) -> int:
        return (delete(server, "toy") if number % 2 else create(server, "toy", toys["llama"])).status_code

    with ThreadPoolExecutor(CLIENTS) as clients:
        statuses = list(clients.map(change, range(CLIENTS * CHANGES)))
    row.is_at_least("200", statuses.count(200), CHANGES)
    row.is_at_most("other than 200, 404, 409", sum(status not in (200, 404, 409) for status in statuses), 0)
    row.is_at_most("deaths", server.log.read_text().count(" died of "), 0)
    assert integrity(server) == "ok"
    good(chat(server))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (Path.unlink, "There is no file at"),
    "truncated": (_truncate, "is truncated"),
    "overwritten": (_overwrite, "is not a GGUF file"),
    "a folder": (partial(_replace, make=Path.mkdir), "is a folder"),
    "a pipe": (partial(_replace, make=os.mkfifo), "device, pipe or socket"),
    "a device": (partial(_replace, make=lambda path: path.symlink_to("/dev/zero")), "device, pipe or socket"),
}


@pytest.mark.parametrize("state", ["cold", "loaded", "streaming"])
def test_a_model_file_that_fails(row: Row, start: Start, tmp_path: Path, slow_toy: Path, state: str) -> None:
    """It is named, and its return is noticed. Of a page that a mapped file has no more a worker dies: once."""
    server, told_ms = start(), list[float]()
    for fault, (break_file, words) in FAULTS.items():
        path = tmp_path / "model.gguf"
        _restore(path, slow_toy)
        good(create(server, "toy", path))
        _reach(server, state, lambda: break_file(path))  # noqa: B023 - it is called here
        refused = chat(server, "toy")
        sentence = error(refused, 400)
        assert (str(path) in sentence, words in sentence) == (True, True), sentence
        told_ms.append(_ms(refused))
        good(chat(server))
        loaded = [model["name"] for model in ask(server, "GET", "/api/ps").json()["models"]]
        assert loaded == ["demo:latest"], fault
        _restore(path, slow_toy)
        good(chat(server, "toy"))
    row.is_within("error", max(told_ms), HANG_MS)
    row.is_at_most("deaths", server.log.read_text().count(" died of "), int(state == "streaming"))


def _reach(server: Server, state: str, then: Callable[[], object]) -> None:
    """Calls `then` when the model `toy` is in that state; returns when no stream runs."""
    if state == "loaded":
        good(chat(server, "toy"))
    if state != "streaming":
        then()
        return
    response = stream(server, 300)
    then()
    try:
        assert lines(response)[-1]
    except requests.exceptions.ChunkedEncodingError:
        whom = f'model "toy" while computing for request {response.headers["X-Request-Id"]}'
        until(lambda: f"died of SIGBUS in {whom}" in server.log.read_text())
        good(ask(server, "GET", "/health"))


def _restore(path: Path, good: Path) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    shutil.copy(good, path)


def _ms(response: requests.Response) -> float:
    return response.elapsed.total_seconds() * 1e3
