"""No model file takes the server down: it is refused in one sentence, or it is served; and what is valid is served."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import requests

from tests.conftest import Server
from tests.hazards import some, times
from tests.hazards.conftest import PATIENCE_S, Start
from tests.hazards.table import Row
from tests.mutants import NAMED, Parts, named, seeded
from tests.toys import CHATML, LLAMA, write_toy
from tests.variants import VALID

SERVERS = 2  # one proves its files one after another
LONGEST_MS = 5_000
ANSWERS = (200, 400, 503)  # served, or refused for what it is or takes

Make = Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a file."""

    case: str
    status: int  # of the answer to a chat, or to the create that refused it
    said: str
    took_ms: float
    died: bool  # the worker

    def __str__(self) -> str:
        return f"{self.case}: {self.status} {self.said}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small model: what is changed by chance is seldom a weight or a word."""
    folder = tmp_path_factory.mktemp("whole")
    sizes = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "feed_forward": 32, "vocabulary": 264}
    return write_toy(folder / "toy.gguf", LLAMA, chat_template=CHATML, **sizes).read_bytes()


def fate(server: Server, case: str, path: Path) -> Fate:
    """Creates a model of the file and chats with it."""
    before, began_s = server.worker_pid, time.perf_counter()
    try:
        status, said = create_and_chat(server, path)
    except (requests.ConnectionError, ValueError) as error:  # cut off, or no JSON
        status, said = 0, str(error)
    took_ms = (time.perf_counter() - began_s) * 1e3
    return Fate(case, status, said, took_ms, died=server.worker_pid != before)


def create_and_chat(server: Server, path: Path) -> tuple[int, str]:
    """The status of what was said last, and that. Raises ValueError for what is not JSON."""
    created = requests.post(f"{server.url}/api/create", json={"name": "x", "modelpath": str(path)}, timeout=PATIENCE_S)
    if created.status_code != 200:
        return created.status_code, created.json()["error"]
    body = {"model": "x", "messages": [{"role": "user", "content": "hello"}], "options": {"num_predict": 4}}
    said = requests.post(f"{server.url}/api/chat", json={**body, "keep_alive": 0}, timeout=PATIENCE_S)
    requests.delete(f"{server.url}/api/delete", json={"name": "x"}, timeout=PATIENCE_S)
    return said.status_code, str(said.json())


def fates(servers: Iterable[Server], folder: Path, files: Mapping[str, Make]) -> list[Fate]:
    """Of all files, each at a server that has nothing else to do."""
    free: queue.SimpleQueue[Server] = queue.SimpleQueue()
    for server in servers:
        free.put(server)

    def meet(case: str) -> Fate:
        server = free.get()
        path = folder / f"{case.replace('/', '')}.gguf"
        path.write_bytes(files[case]())
        try:
            return fate(server, case, path)
        finally:
            path.unlink()
            free.put(server)

    with ThreadPoolExecutor(SERVERS) as threads:
        return list(threads.map(meet, files))


def judge(row: Row, outcomes: list[Fate], *statuses: int) -> None:
    """Every case that went wrong is named."""
    row.is_at_most("deaths", sum(outcome.died for outcome in outcomes), 0)
    assert [str(outcome) for outcome in outcomes if outcome.died or outcome.status not in statuses] == []
    slowest = max(outcomes, key=lambda outcome: outcome.took_ms)
    row.is_within(f"slowest of {len(outcomes)} ('{slowest.case}')", slowest.took_ms, LONGEST_MS)


def test_what_is_taken_apart_can_be_put_together(whole: bytes) -> None:
    assert Parts.of(whole).bytes() == whole


def test_every_case_changes_the_file(whole: bytes) -> None:
    assert [case for case in NAMED if named(whole, case) == whole] == []


def test_model_files_that_are_wrong_in_one_place(start: Start, row: Row, whole: bytes, tmp_path: Path) -> None:
    servers = [start(NUM_CTX=256) for _ in range(SERVERS)]
    judge(row, fates(servers, tmp_path, {case: partial(named, whole, case) for case in some(NAMED)}), *ANSWERS)


def test_model_files_that_are_wrong_by_chance(start: Start, row: Row, whole: bytes, tmp_path: Path) -> None:
    servers = [start(NUM_CTX=256) for _ in range(SERVERS)]
    seeds = range(times(3_000, 20))
    judge(row, fates(servers, tmp_path, {f"seed {seed}": partial(seeded, whole, seed) for seed in seeds}), *ANSWERS)


def test_model_files_that_are_unusual_and_valid(start: Start, row: Row, tmp_path: Path) -> None:
    server = start(NUM_CTX=256)
    paths = {case: VALID[case](tmp_path / case) for case in some(VALID)}
    outcomes = [fate(server, case, path) for case, path in paths.items()]
    judge(row, outcomes, 200)
    row.is_at_least("served", len(outcomes), times(20, 1))
