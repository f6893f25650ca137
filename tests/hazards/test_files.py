"""No model file takes the server down: it is refused in one sentence, or it is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.conftest import Server, start_server
from tests.hazards import times
from tests.mutants import NAMED, Parts, named, seeded
from tests.toys import CHATML, LLAMA, write_toy

PATIENCE_S = 60
SEEDED = times(3_000, 20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_toy(tmp_path_factory.mktemp("whole") / "toy.gguf", LLAMA, layers=2, chat_template=CHATML).read_bytes()


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(tmp_path_factory.mktemp("victim"), environ={"RUSTLLAMA_NUM_CTX": "256"})
    yield running
    assert running.stop() == 0


def survives(server: Server, path: Path) -> str:
    """Creates a model of the file and chats with it; what came of it. The worker must be the same afterwards."""
    before = server.worker_pid
    created = requests.post(f"{server.url}/api/create", json={"name": "x", "modelpath": str(path)}, timeout=PATIENCE_S)
    said = created.json()
    if created.status_code == 200:
        body = {"model": "x", "messages": [{"role": "user", "content": "hello"}], "options": {"num_predict": 4}}
        said = requests.post(f"{server.url}/api/chat", json={**body, "keep_alive": 0}, timeout=PATIENCE_S).json()
        requests.delete(f"{server.url}/api/delete", json={"name": "x"}, timeout=PATIENCE_S)
    assert server.worker_pid == before, "the worker died"
    assert requests.get(f"{server.url}/api/version", timeout=PATIENCE_S).ok
    assert "Traceback" not in str(said)
    return str(said.get("error") or "served")


def test_what_is_taken_apart_can_be_put_together(whole: bytes) -> None:
    assert Parts.of(whole).bytes() == whole


def test_the_whole_file_is_served(victim: Server, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").write_bytes(whole)
    assert survives(victim, tmp_path / "toy.gguf") == "served"


@pytest.mark.parametrize("case", NAMED)
def test_a_file_that_is_wrong_in_one_place(victim: Server, whole: bytes, tmp_path: Path, case: str) -> None:
    changed = named(whole, case)
    assert changed != whole
    (tmp_path / "toy.gguf").write_bytes(changed)
    survives(victim, tmp_path / "toy.gguf")


@pytest.mark.parametrize("seed", range(SEEDED))
def test_a_file_that_is_wrong_by_chance(victim: Server, whole: bytes, tmp_path: Path, seed: int) -> None:
    (tmp_path / "toy.gguf").write_bytes(seeded(whole, seed))
    survives(victim, tmp_path / "toy.gguf")
