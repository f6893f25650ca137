"""What was computed survives the process, and a disk that fails or lies costs only what it would have saved."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import gevent
import numpy as np
import pytest

from rustllama.core import LoadOptions, MemoryPlan
from rustllama.engine.batch import Restore
from rustllama.engine.disk_store import DiskStore
from rustllama.engine.engine import LlamaEngine, LlamaEngines
from rustllama.engine.native import BUILD
from rustllama.engine.prefix_store import PrefixStore
from rustllama.engine.scheduler import Scheduler
from rustllama.engine.sequence import Sequence
from rustllama.engine.sharing import Fetch, Sharing
from rustllama.engine.shelf import Shelf
from rustllama.engine.state_folder import StateFolder
from rustllama.engine.states import Cuts, Saved, Shape, Stored, as_tokens
from rustllama.engine.tally import Source
from rustllama.settings import Settings
from tests.conftest import SHAPES
from tests.test_engine_lane import N_CTX, SLOTS, record, until_idle
from tests.test_engine_reuse import (
    assert_a_fresh_engine_agrees,
    cached,
    finish,
    request,
    said,
    spelled,
    written,
)
from tests.test_engine_scheduler import Outlet, decoding, play

SHAPE = Shape("digest", N_CTX, SLOTS, "off", "f32")
ROOM = 100_000_000


@pytest.fixture(params=SHAPES)
def toy(request: pytest.FixtureRequest, toys: dict[str, Path]) -> Path:
    return toys[request.param]


@contextmanager
def process(home: Path, toy: Path, **settings: object) -> Iterator[LlamaEngine]:
    """The engine of a server that starts with this state folder, and ends with the block."""
    exact = {"flash_attention": "off", "kv_cache_type": "f32", "num_thread": 1}
    chosen = {"home": home, "prompt_cache_disk": ROOM, **exact, **settings}
    made = LlamaEngines(Settings(**chosen))  # type: ignore[arg-type]
    engine = made(record(toy), LoadOptions(), MemoryPlan(N_CTX, SLOTS, 0))
    yield engine
    until_idle(engine)
    engine.close()
    made.flush()
    engine._shared.disk.check_integrity()


def until_written(disk: DiskStore) -> None:
    with gevent.Timeout(30):
        while disk._leaving:
            gevent.sleep(0.001)


def until_known(engine: LlamaEngine) -> None:
    with gevent.Timeout(30):
        while not any(list(index) for index in engine._shared.disk._indexes.values()):
            gevent.sleep(0.001)


def files(home: Path) -> list[Path]:
    return sorted((home / "prompts").glob("*")) if (home / "prompts").exists() else []


def test_a_conversation_goes_on_after_a_restart(toy: Path, tmp_path: Path) -> None:
    with process(tmp_path, toy) as engine:
        tokens = written(engine, request(said(1, 80)))
    with process(tmp_path, toy) as engine:
        stream = engine.submit(request(tokens + said(2, 10)))
        usage = list(stream)[-1].usage
        assert usage is not None
        assert usage.cached_tokens == len(tokens) - 1
    assert_a_fresh_engine_agrees(toy, [stream._sequence])


def test_what_is_read_from_disk_is_counted(toys: dict[str, Path], tmp_path: Path) -> None:
    with process(tmp_path, toys["llama"]) as engine:
        finish(engine, request((*said(1, 100), 5), 1))
    with process(tmp_path, toys["llama"]) as engine:
        finish(engine, request((*said(1, 100), 5, 6), 1))
        assert engine._tally.prompt_tokens == {Source.DISK: 101, Source.COMPUTED: 1}
        state = engine._shared.disk.state()
        assert (state.limit_bytes, state.states, state.tokens, state.evicted) == (ROOM, 1, 101, 0)
        assert state.used_bytes == files(tmp_path)[0].stat().st_size


def test_what_is_on_disk_is_for_its_owner_only(toys: dict[str, Path], tmp_path: Path) -> None:
    asked = replace(request((*said(1, 100), 5), 1), owner="a")
    with process(tmp_path, toys["llama"]) as engine:
        finish(engine, asked)
    with process(tmp_path, toys["llama"]) as engine:
        finish(engine, replace(asked, prompt=said(2, 20)))  # from here on it knows what this owner has
        until_known(engine)
        found = [finish(engine, replace(asked, owner=owner))[1].cached_tokens for owner in ("b", "", "a")]
    assert found == [0, 0, 100]


def test_prompts_that_come_together_after_a_restart_all_use_what_is_on_disk(toy: Path, tmp_path: Path) -> None:
    common = said(1, 100)
    with process(tmp_path, toy) as engine:
        finish(engine, request((*common, 5), 1))
    with process(tmp_path, toy) as engine:
        streams = [engine.submit(request((*common, 5, *said(10 + i, 10)))) for i in range(SLOTS)]
        usages = [list(stream)[-1].usage for stream in streams]
        assert [usage.cached_tokens for usage in usages if usage] == [101] * SLOTS
    assert_a_fresh_engine_agrees(toy, [stream._sequence for stream in streams])


def test_what_a_model_wrote_is_taken_as_the_tokens_it_wrote_after_a_restart(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    text = "let us see " * 8
    with process(tmp_path, toys["llama"]) as engine:
        question = spelled(engine, "<|im_start|>", trusted=True)
        letters = tuple(token for letter in text for token in spelled(engine, letter))
        finish(engine, request(question + letters, 1))
    with process(tmp_path, toys["llama"]) as engine:
        again = spelled(engine, f"<|im_start|>{text}<|im_end|>", trusted=True)
        assert again[:-1] == question + letters
        assert cached(engine, again) == len(again) - 1


@pytest.mark.parametrize("place", [-1, 20, 200])
def test_a_damaged_file_is_computed_again(toys: dict[str, Path], tmp_path: Path, place: int) -> None:
    with process(tmp_path, toys["llama"]) as engine:
        tokens = written(engine, request(said(1, 80)))
    content = bytearray(files(tmp_path)[0].read_bytes())
    content[place] ^= 1
    files(tmp_path)[0].write_bytes(content)
    with process(tmp_path, toys["llama"]) as engine:
        again = written(engine, request(tokens[:80]))
        assert (again, cached(engine, tokens)) == (tokens, len(tokens) - 1)
    with process(tmp_path, toys["llama"]) as engine:
        assert cached(engine, tokens) == len(tokens) - 1


def test_a_state_that_llama_cpp_refuses_is_dropped(toys: dict[str, Path], tmp_path: Path) -> None:
    """Its checksum is right, so nothing but llama.cpp can tell."""
    folder, prompt = StateFolder(tmp_path / "prompts", ROOM, BUILD), said(1, 80)
    folder.write(Saved(SHAPE._replace(digest=""), as_tokens(prompt), 80, np.zeros(1000, np.uint8).data))
    (wrong,) = files(tmp_path)
    with process(tmp_path, toys["llama"]) as engine:
        assert written(engine, request(prompt))[:80] == prompt
    assert wrong not in files(tmp_path)


def test_nothing_is_written_unless_it_is_asked_for(toys: dict[str, Path], tmp_path: Path) -> None:
    with process(tmp_path, toys["llama"], prompt_cache_disk=0) as engine:
        finish(engine, request(said(1, 80)))
    assert files(tmp_path) == []


def test_what_leaves_memory_is_still_found(toy: Path, tmp_path: Path) -> None:
    with process(tmp_path, toy, prompt_cache_memory=250_000) as engine:
        engine._shared.disk._most_leaving_bytes = ROOM  # or what waits for a disk that is slow today is lost
        prompts = [(*said(seed, 80), 5) for seed in range(12)]
        for prompt in prompts:
            assert cached(engine, prompt) == 0
        assert len(list(engine._shared.store)) < len(prompts), "all of it fits in memory"
        for prompt in prompts:
            until_written(engine._shared.disk)
            assert cached(engine, (*prompt, 6)) == 81


def test_what_is_forgotten_is_forgotten_on_disk_too(toys: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        with process(tmp_path, toys["llama"]) as engine:
            assert cached(engine, said(1, 80)) == 0
        assert files(tmp_path)
        LlamaEngines(Settings(home=tmp_path)).forget("")
        assert files(tmp_path) == []


def saved(tokens: tuple[int, ...], size_bytes: int = 1000) -> Saved:
    return Saved(SHAPE, as_tokens(tokens), len(tokens), memoryview(bytes(size_bytes)))


class Disk:
    """A store without engines; what is put into `memory` must be told."""

    def __init__(self, folder: StateFolder, memory_bytes: int = 10_000, rest_s: float = 3600.0) -> None:
        self.folder = folder
        self.memory = PrefixStore(memory_bytes)
        self.store = DiskStore(folder, self.memory, rest_s)
        self.store.open(SHAPE, Cuts())
        self.shelf = Shelf(self.memory, SHAPE, Cuts(), token_bytes=1, disk=self.store)

    def put(self, *tokens: tuple[int, ...]) -> None:
        for one in tokens:
            self.shelf.put(one, len(one), memoryview(bytes(1000)), exact=0)

    @property
    def held(self) -> list[int]:
        return sorted(stored.held for stored in self.folder.heads(SHAPE, self.folder.names(SHAPE)))


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "prompts", ROOM, "build")


def test_a_state_that_rests_is_written_and_one_that_was_replaced_is_not(folder: StateFolder) -> None:
    disk = Disk(folder, rest_s=0.02)
    disk.put(said(1, 70), said(1, 70) + said(2, 10), said(3, 90))
    with gevent.Timeout(30):
        while disk.held != [80, 90]:
            gevent.sleep(0.005)
    disk.store.check_integrity()


def test_the_next_turn_replaces_the_one_before_on_disk(folder: StateFolder) -> None:
    disk = Disk(folder)
    for length in (70, 80, 90):
        disk.put(said(1, length))
        disk.store.flush()
    assert disk.held == [90]
    disk.put(said(1, 75))
    disk.store.flush()
    assert disk.held == [90], "it can be had from what is there"
    disk.store.check_integrity()


def test_a_disk_smaller_than_memory_gets_each_state_once_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    disk = Disk(StateFolder(tmp_path / "prompts", 3000, "build"))
    disk.put(*(said(seed, 70 + seed) for seed in range(4)))
    for _ in range(3):
        disk.store._ring()
    disk.store.flush()
    assert disk.held == [72, 73]
    assert disk.store.state().evicted == 2


def test_a_disk_that_takes_nothing_leaves_all_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    disk = Disk(StateFolder(tmp_path / "file" / "prompts", ROOM, "build"))
    disk.put(said(1, 70), said(2, 70))
    disk.store.flush()
    assert len(list(disk.memory)) == 2
    assert caplog.text.count("could not be saved") == 1


class SlowFolder(StateFolder):
    """Each read and write waits until the test lets it go."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, ROOM, "build")
        self.go = threading.Event()

    def read(self, stored: Stored) -> memoryview | None:
        self.go.wait(30)
        return super().read(stored)

    def write(self, saved: Saved) -> tuple[Stored | None, list[str]]:
        self.go.wait(30)
        return super().write(saved)


def test_what_is_forgotten_while_it_is_read_or_written_stays_forgotten(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "prompts")
    StateFolder(tmp_path / "prompts", ROOM, "build").write(saved(said(1, 70)))
    disk = Disk(folder, memory_bytes=1000)
    found = disk.store.find(SHAPE, as_tokens(said(1, 80)))
    assert found is not None
    disk.put(said(2, 70), said(3, 70))  # one leaves memory for the other
    reading = gevent.spawn(disk.store.fetch, found[0])
    gevent.sleep(0)
    disk.memory.forget("digest")
    forgetting = gevent.spawn(disk.store.forget, "digest")
    gevent.sleep(0)
    folder.go.set()
    reading.get()
    forgetting.get()
    disk.store.flush()
    assert (list(disk.memory), disk.held, files(tmp_path)) == ([], [], [])


def test_a_disk_slower_than_what_leaves_memory_loses_some_and_bounds_what_waits(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "prompts")
    disk, big = Disk(folder), 70_000_000
    disk.store._see_off([saved(said(seed, 70), big) for seed in range(3)])
    assert len(disk.store._leaving) == 1
    folder.go.set()
    until_written(disk.store)


def test_what_waits_for_the_disk_is_an_eighth_of_what_memory_keeps(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "prompts")
    disk = Disk(folder, memory_bytes=8_000)
    disk.store._see_off([saved(said(seed, 70), 400) for seed in range(5)])
    assert len(disk.store._leaving) == 2
    folder.go.set()
    until_written(disk.store)
    assert disk.held == [70, 70]


@pytest.mark.parametrize(
    ("on_disk", "known", "worth"),
    [(70, 0, True), (63, 0, False), (200, 136, True), (200, 137, False), (2000, 1900, False)],
)
def test_a_state_is_read_where_it_adds_enough(folder: StateFolder, on_disk: int, known: int, worth: bool) -> None:
    folder.write(saved(said(1, on_disk)))
    disk = Disk(folder)
    assert bool(disk.shelf.find_on_disk(as_tokens(said(1, on_disk)), known)) == worth


def test_a_state_larger_than_memory_is_left_on_disk(folder: StateFolder) -> None:
    folder.write(saved(said(1, 70), size_bytes=20_000))
    assert Disk(folder, memory_bytes=10_000).shelf.find_on_disk(as_tokens(said(1, 70)), 0) is None


def test_others_go_on_while_a_prompt_waits_for_the_disk(folder: StateFolder) -> None:
    folder.write(saved(said(1, 70)))
    disk = Disk(folder)
    made = Scheduler(4, 512, 8, 200, Sharing(disk.shelf))
    stream, waits = (Sequence(request(prompt), Outlet(), 0) for prompt in (said(2, 20), said(1, 80)))
    for one in (stream, waits):
        made.add(one)
    for _ in range(3):
        batch = made.plan(1)
        assert batch is not None
        assert [chunk.sequence for chunk in batch.prompt if chunk.sequence is waits] == []
        play(batch)
    (fetch,) = made.sharing.fetches
    disk.store.fetch(fetch.stored)
    fetch.goes_on = False
    batch = made.plan(1)
    assert batch is not None
    assert [type(change) for change in batch.arrange] == [Restore]
    assert (decoding(batch), batch.prompt[0].count) == ((stream,), 10)


def test_a_prompt_whose_state_was_gone_is_computed(folder: StateFolder, tmp_path: Path) -> None:
    folder.write(saved(said(1, 70)))
    disk = Disk(folder)
    made = Scheduler(4, 512, 8, 200, Sharing(disk.shelf))
    made.add(Sequence(request(said(1, 80)), Outlet(), 0))
    assert made.plan(1) is None
    (fetch,) = made.sharing.fetches
    assert isinstance(fetch, Fetch)
    files(tmp_path)[0].unlink()
    disk.store.fetch(fetch.stored)
    fetch.goes_on = False
    batch = made.plan(1)
    assert batch is not None
    assert batch.prompt[0].count == 64


def test_a_prompt_that_gets_more_from_disk_than_others_wait_for_is_computed_from_there(folder: StateFolder) -> None:
    common = said(1, 80)
    folder.write(saved((*common, *said(2, 10))))
    disk = Disk(folder)
    made = Scheduler(4, 512, 8, 200, Sharing(disk.shelf))
    reads, waits, stream = (
        Sequence(request(prompt), Outlet(), 0)
        for prompt in ((*common, *said(2, 20)), (*common, *said(3, 20)), said(4, 20))
    )
    for one in (reads, waits, stream):
        made.add(one)
    play(made.plan(1))  # type: ignore[arg-type]
    play(made.plan(1))  # type: ignore[arg-type]
    assert made.slots[:3] == [stream, waits, reads]
    (fetch,) = made.sharing.fetches
    disk.store.fetch(fetch.stored)
    fetch.goes_on = False
    for sequence, count in ((reads, 10), (waits, 20)):
        batch = made.plan(1)
        assert batch is not None
        assert [(chunk.sequence, chunk.count) for chunk in batch.prompt] == [(sequence, count)]
        play(batch)
