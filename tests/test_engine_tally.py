"""What the engine counts of itself: where prompts come from, tokens, gaps, cells, stores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rustllama.core import LoadOptions, MemoryPlan
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.engine import LlamaEngine, LlamaEngines
from rustllama.engine.prefix_store import PrefixStore
from rustllama.engine.states import Cuts
from rustllama.engine.tally import Histogram, ModelTally, Source
from rustllama.settings import Settings
from tests.test_engine_lane import N_CTX, SLOTS, _checked, ask, open_engine, record, until_idle
from tests.test_engine_reuse import finish, request, said, saved
from tests.test_engine_scheduler import MS, scheduler, sequence, step
from tests.toys import ToyShape, write_toy


@pytest.fixture
def engine(toys: dict[str, Path]) -> Iterator[LlamaEngine]:
    yield from _checked(open_engine(toys["llama"], speculation=False))


def reused(tally: ModelTally) -> dict[Source, tuple[int, int]]:
    """Prompts and tokens, where there are any."""
    return {source: (tally.prompts[source], tally.prompt_tokens[source]) for source in Source if tally.prompts[source]}


def test_a_duration_counts_up_to_its_bound_and_beyond_the_last_one_too() -> None:
    histogram = Histogram((10, 20))
    for duration_ns in (1, 10, 11, 20, 21, 1000):
        histogram.observe(duration_ns)
    assert (histogram.counts, histogram.sum_ns) == ([2, 2, 2], 1063)


def test_an_answer_counts_its_tokens_and_the_gaps_between_them(engine: LlamaEngine) -> None:
    finish(engine, ask(1, max_tokens=7))
    assert engine._tally.answer_tokens == 7
    assert sum(engine._tally.gaps.counts) == 6
    assert engine._tally.gaps.sum_ns > 0


def test_the_time_of_the_calls_counts_by_what_they_compute(engine: LlamaEngine) -> None:
    started_ns = time.perf_counter_ns()
    finish(engine, ask(1, max_tokens=1))
    prompt_ns, decode_ns = engine._tally.prompt_ns, engine._tally.decode_ns
    finish(engine, ask(1, max_tokens=7))
    assert (prompt_ns > 0, decode_ns) == (True, 0)
    assert 0 < engine._tally.decode_ns < time.perf_counter_ns() - started_ns


def test_drafts_count_by_whether_they_came_true(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy.gguf", ToyShape(layers=1))  # it says much again, and then something else
    for engine in _checked(open_engine(tmp_path / "toy.gguf")):
        engine._lanes[0]._scheduler.decode_cost = DecodeCost(SLOTS, [0, *[1.0] * 16])  # where rows cost nothing
        stream = engine.submit(ask(1, max_tokens=300, length=20))
        list(stream)
        assert engine._tally.drafts_accepted > 0
        assert engine._tally.drafts_rejected > 0
        assert engine._tally.answer_tokens == 300
        assert sum(engine._tally.gaps.counts) == 299 - engine._tally.drafts_accepted


def test_a_prompt_counts_as_it_is_computed_whole_or_not(engine: LlamaEngine) -> None:
    finish(engine, request(said(1, 50)))
    assert reused(engine._tally) == {Source.COMPUTED: (1, 50)}


def test_a_prompt_saved_in_memory_counts_so_and_the_rest_as_computed(engine: LlamaEngine) -> None:
    for seed in (2, 3):
        finish(engine, request(said(1, 50) + said(seed, 10)))
        until_idle(engine)
    assert reused(engine._tally) == {Source.COMPUTED: (1, 70), Source.MEMORY: (1, 50)}


def test_a_prompt_copied_from_a_stream_that_runs_counts_so(engine: LlamaEngine) -> None:
    stream = engine.submit(request(said(1, 50), max_tokens=None))  # type: ignore[arg-type]
    next(iter(stream))
    finish(engine, request(said(1, 50) + said(2, 10)))
    stream.cancel()
    assert reused(engine._tally) == {Source.COMPUTED: (1, 60), Source.RUNNING: (1, 50)}


def test_prompts_that_wait_for_another_count_so(engine: LlamaEngine) -> None:
    streams = [engine.submit(request(said(1, 100) + said(10 + i, 10))) for i in range(SLOTS)]
    for stream in streams:
        list(stream)
    assert reused(engine._tally) == {Source.COMPUTED: (1, 140), Source.AWAITED: (3, 300)}


def test_a_state_that_could_not_be_used_counts_as_computed() -> None:
    one = sequence()
    one.source, one.cached = Source.MEMORY, 0  # what the runner leaves
    one.accept(7, b"x", 1)
    assert reused(one.tally) == {Source.COMPUTED: (1, 0)}


def test_the_queue_time_ends_with_the_slot() -> None:
    made, both = scheduler(n_slots=1), [sequence(max_tokens=1) for _ in range(2)]
    for s in both:
        made.add(s)
    for now_ms in (3, 40):
        step(made, now_ns=now_ms * MS)
    assert [s.tally.queue.sum_ns for s in both] == [3 * MS, 40 * MS]


def test_a_running_engine_tells_of_its_cells(engine: LlamaEngine) -> None:
    engine.reserve(1500, available_bytes=10**9)
    stream = engine.submit(ask(1, max_tokens=None, length=40))
    deltas = iter(stream)
    next(deltas)
    state = engine.state()
    assert (state.slots, state.cells) == (SLOTS + 1, SLOTS * N_CTX + 2048)
    assert 40 <= state.cells_used < N_CTX
    stream.cancel()
    until_idle(engine)
    assert engine.state().cells_used == 0


def test_the_counts_of_a_model_outlive_it(toys: dict[str, Path]) -> None:
    engines = LlamaEngines(Settings(flash_attention="off", kv_cache_type="f32", num_thread=1))
    for count in (1, 2):
        engine = engines(record(toys["llama"]), LoadOptions(), MemoryPlan(N_CTX, SLOTS, 0))
        finish(engine, ask(1, max_tokens=5))
        until_idle(engine)
        engine.close()
        assert engines.tally.models["toy"].answer_tokens == 5 * count
    (store,) = engines.stores()
    assert (store.states, store.tokens) == (1, 44)
    assert 0 < store.used_bytes < store.limit_bytes


def test_a_store_counts_what_leaves_for_others() -> None:
    store = PrefixStore(limit_bytes=250)
    for seed in (1, 2, 3):
        store.put(saved(said(seed, 20)), Cuts())
    store.put(saved(said(3, 20) + said(4, 5)), Cuts())  # takes the place of the one before: nothing is lost
    assert (store.state().evicted, store.state().states, store.state().tokens) == (1, 2, 45)
