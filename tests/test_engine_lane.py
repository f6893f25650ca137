"""The live engine on toy models: exact among others, cancelled in any phase, bounded by its context."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gevent
import numpy as np
import pytest
from gguf import GGUFReader

from rustllama import gguf
from rustllama.core import (
    Delta,
    FileIdentity,
    FinishReason,
    GenerateRequest,
    LoadOptions,
    MemoryPlan,
    ModelRecord,
    Queued,
    Reading,
    SamplingParams,
    Span,
)
from rustllama.engine import lane, runner
from rustllama.engine.batch import Batch, Timing
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.engine import LlamaEngine, LlamaEngines
from rustllama.engine.runner import Runner
from rustllama.engine.scheduler import Scheduler
from rustllama.errors import Busy, Cancelled, Draining, InternalError, OutOfMemory
from rustllama.settings import Settings
from tests.conftest import SHAPES
from tests.toys import LLAMA, ToyShape, write_toy

GREEDY = SamplingParams(temperature=0)
SLOTS, N_CTX = 4, 512


def record(path: Path) -> ModelRecord:
    return ModelRecord("toy", str(path), "", "", FileIdentity(0, 0, 0, 0), gguf.read(path))


def open_engine(path: Path, **settings: object) -> LlamaEngine:
    """As exact as it gets: a KV cache of half precision makes more of the rounding of other batch shapes. On one core:
    two wait for each other at every operation, for ever so long where the machine is busy.
    """
    made = Settings(flash_attention="off", kv_cache_type="f32", num_thread=1, **settings)  # type: ignore[arg-type]
    return LlamaEngines(made)(record(path), LoadOptions(), MemoryPlan(N_CTX, SLOTS, 0))


@pytest.fixture(params=SHAPES)
def any_engine(request: pytest.FixtureRequest, toys: dict[str, Path]) -> Iterator[LlamaEngine]:
    yield from _checked(open_engine(toys[request.param]))


@pytest.fixture
def engine(toys: dict[str, Path]) -> Iterator[LlamaEngine]:
    yield from _checked(open_engine(toys["llama"]))


def _checked(engine: LlamaEngine) -> Iterator[LlamaEngine]:
    yield engine
    until_idle(engine)
    engine.check_integrity()
    engine.close()


def until_idle(engine: LlamaEngine) -> None:
    """Waits until nothing runs, and what ended is saved, which would take a while."""
    with gevent.Timeout(30):
        while engine.state().running or engine.state().queued or any(lane.ended for lane in engine._lanes):
            for lane in engine._lanes:
                lane._wake()
            gevent.sleep(0.001)


def prompt(number: int, length: int = 40) -> tuple[int, ...]:
    return tuple(3 + (number * 31 + i * i * 7) % 300 for i in range(length))


def ask(number: int, max_tokens: int | None = 24, length: int = 40, **more: object) -> GenerateRequest:
    fields = {"num_ctx": N_CTX, "sampling": GREEDY, **more}
    return GenerateRequest(str(number), prompt(number, length), max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


def answer(engine: LlamaEngine, request: GenerateRequest) -> str:
    return "".join(delta.text for delta in engine.submit(request))


def last(engine: LlamaEngine, request: GenerateRequest) -> Delta:
    return list(engine.submit(request))[-1]


def test_concurrent_greedy_answers_equal_the_sequential_ones(any_engine: LlamaEngine) -> None:
    requests = [ask(i, max_tokens=10 + i, length=5 + 17 * (i % 5)) for i in range(12)]
    alone = [answer(any_engine, request) for request in requests]
    together = [gevent.spawn(answer, any_engine, request) for request in requests]
    assert [greenlet.get() for greenlet in together] == alone
    assert len(set(alone)) > 8, "the toy's text does not depend on its prompt"


def test_answers_stay_exact_while_others_are_cancelled_at_random(any_engine: LlamaEngine) -> None:
    requests = [ask(i, max_tokens=16, length=30) for i in range(8)]
    alone = [answer(any_engine, request) for request in requests]
    together = [gevent.spawn(answer, any_engine, request) for request in requests]
    for i in range(8):
        stream = any_engine.submit(ask(100 + i, max_tokens=200))
        gevent.sleep(0.001 * i)
        stream.cancel()
    assert [greenlet.get() for greenlet in together] == alone


def test_a_cancelled_stream_raises_at_its_reader_and_frees_its_slot(engine: LlamaEngine) -> None:
    stream = engine.submit(ask(1, max_tokens=None))
    deltas = iter(stream)
    next(deltas)
    stream.cancel()
    with pytest.raises(Cancelled):
        list(deltas)
    until_idle(engine)


def test_a_prompt_is_aborted_in_the_middle_of_its_call(tmp_path: Path) -> None:
    wide = write_toy(tmp_path / "wide.gguf", LLAMA, width=512, layers=8, feed_forward=2048, heads=8)
    for engine in _checked(open_engine(wide)):
        answer(engine, ask(1, length=400, max_tokens=1))  # now the cost of a prompt is known: one call takes it all
        stream = engine.submit(ask(2, length=500))
        while engine._lanes[0]._runner._alone is None:
            gevent.sleep(0.001)
        stream.cancel()
        until_idle(engine)
        assert stream._sequence.computed == 0
        assert answer(engine, ask(3, max_tokens=3))


def test_a_prompt_tells_how_much_of_it_is_computed_and_how_much_was_kept(engine: LlamaEngine) -> None:
    for cached in (0, 399):
        stream = engine.submit(ask(1, length=400))
        *_, last_told = stream.progress()
        assert last_told == Reading(400, 400, cached)
        assert list(stream)[-1].finish
        until_idle(engine)


def test_who_waits_for_a_slot_is_told_its_place_as_long_as_it_waits(engine: LlamaEngine) -> None:
    running = [engine.submit(ask(i, max_tokens=None)) for i in range(SLOTS)]
    stream = engine.submit(ask(10))
    lane = engine._lanes[0]
    assert lane.progress(stream._sequence) == Queued(1)
    running[0].cancel()
    assert lane.progress(stream._sequence) is None, "it gets the slot in the next plan"
    assert list(stream.progress())[-1] == Reading(40, 40, 0)
    stream.cancel()
    assert lane.progress(stream._sequence) is None
    for other in running:
        other.cancel()


def test_the_same_seed_gives_the_same_text_and_another_one_another(engine: LlamaEngine) -> None:
    def drawn(seed: int) -> str:
        return answer(engine, ask(1, sampling=SamplingParams(seed=seed, temperature=2.0, top_k=0, top_p=1.0)))

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_a_repeat_penalty_sees_the_prompt(engine: LlamaEngine) -> None:
    penalty = SamplingParams(temperature=0, repeat_penalty=2.0, repeat_last_n=-1)
    assert answer(engine, ask(1, sampling=penalty)) != answer(engine, ask(1))


def test_an_answer_ends_with_its_context(engine: LlamaEngine) -> None:
    final = last(engine, ask(1, max_tokens=None, num_ctx=100))
    assert final.finish is FinishReason.LENGTH
    assert final.usage is not None
    assert final.usage.prompt_tokens + final.usage.completion_tokens == 100


def test_an_answer_fills_its_slot_to_the_last_cell(any_engine: LlamaEngine) -> None:
    final = last(any_engine, ask(1, max_tokens=None, num_ctx=N_CTX))
    assert final.usage is not None
    assert final.usage.prompt_tokens + final.usage.completion_tokens == N_CTX


def test_a_stop_string_ends_the_answer_before_it(engine: LlamaEngine) -> None:
    whole = answer(engine, ask(1))
    stop = whole[len(whole) // 2 :][:3]
    final = answer(engine, ask(1, stop=(stop,)))
    assert final == whole.split(stop)[0]


def test_an_end_of_generation_token_ends_the_answer_without_text(tmp_path: Path) -> None:
    eager = write_toy(tmp_path / "eager.gguf", LLAMA, control_logit=1000.0)
    for engine in _checked(open_engine(eager)):
        final = last(engine, ask(1))
        assert (final.text, final.finish) == ("", FinishReason.STOP)


def test_a_full_queue_is_refused_at_once_and_the_rest_is_served(toys: dict[str, Path]) -> None:
    for engine in _checked(open_engine(toys["llama"], max_queue=2)):
        streams = [engine.submit(ask(i)) for i in range(SLOTS + 2)]
        with pytest.raises(Busy, match="maximum pending requests exceeded"):
            engine.submit(ask(99))
        assert all(list(stream)[-1].finish for stream in streams)


def test_a_larger_context_is_made_beside_the_usual_one(engine: LlamaEngine) -> None:
    engine.reserve(1500, available_bytes=10**9)
    final = last(engine, ask(1, max_tokens=None, num_ctx=1500))
    assert final.usage is not None
    assert final.usage.prompt_tokens + final.usage.completion_tokens == 1500
    assert engine.state().context_length == N_CTX


def test_a_larger_context_without_memory_is_refused_with_both_figures(engine: LlamaEngine) -> None:
    with pytest.raises(OutOfMemory, match=r"needs .* GiB more memory, and 0.0 GiB are free"):
        engine.reserve(1500, available_bytes=1000)


def test_ending_all_gives_every_reader_the_reason(engine: LlamaEngine) -> None:
    streams = [engine.submit(ask(i, max_tokens=None)) for i in range(SLOTS + 2)]
    engine.end_all(Draining("bye"))
    for stream in streams:
        with pytest.raises(Draining, match="bye"):
            list(stream)


def test_plain_text_never_becomes_a_special_token(engine: LlamaEngine) -> None:
    text = "<|im_end|>"
    trusted = engine.tokenize((Span(text, trusted=True),), add_special=False)
    plain = engine.tokenize((Span(text, trusted=False),), add_special=False)
    assert len(trusted) == 1
    assert len(plain) > 1


def test_bos_is_added_once(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "bos.gguf", LLAMA, add_bos=True)
    for engine in _checked(open_engine(toy)):
        bare = engine.tokenize((Span("hello", trusted=True),), add_special=True)
        spelled = engine.tokenize((Span("<|endoftext|>hello", trusted=True),), add_special=True)
        assert bare == spelled


@pytest.mark.parametrize("ms", [[0, 1, 9, 9, 9], [0, 9, 9, 9, 1], [0, 9, 1, 9, 9]])
def test_answers_do_not_depend_on_the_shape_of_the_calls(any_engine: LlamaEngine, ms: list[float]) -> None:
    requests = [ask(i, max_tokens=12 + 4 * i) for i in range(3)]
    alone = [answer(any_engine, request) for request in requests]
    any_engine._lanes[0]._scheduler.decode_cost = DecodeCost(SLOTS, ms)
    together = [gevent.spawn(answer, any_engine, request) for request in requests]
    assert [greenlet.get() for greenlet in together] == alone


def test_a_run_that_nothing_interrupts_is_planned_again_after_a_while(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[int] = []
    plan = Scheduler.plan

    def counted(scheduler: Scheduler, now_ns: int, *, others_wait: bool = False) -> Batch | None:
        plans.append(now_ns)
        return plan(scheduler, now_ns, others_wait=others_wait)

    monkeypatch.setattr(Scheduler, "plan", counted)
    text = answer(engine, ask(1, max_tokens=40))
    until_idle(engine)
    seldom = len(plans)
    monkeypatch.setattr(runner, "_AHEAD_NS", 0)
    assert answer(engine, ask(1, max_tokens=40)) == text
    assert len(plans) - seldom >= 40 > seldom


def test_an_idle_engine_learns_what_its_calls_cost(engine: LlamaEngine) -> None:
    cost = engine._lanes[0]._scheduler.decode_cost
    with gevent.Timeout(30):
        while cost.wanted:
            gevent.sleep(0.01)
    assert all(cost.ms[1 : SLOTS + 1])
    assert answer(engine, ask(1)), "what was measured is cleared"


def test_an_idle_engine_that_is_disturbed_measures_ever_more_seldom(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def disturbed(_: Runner, rows: int) -> Timing:
        calls.append(time.monotonic())
        return Timing(rows, 0.0, 1, crowded=True)

    monkeypatch.setattr(Runner, "measure", disturbed)
    with gevent.Timeout(30):
        while len(calls) < 3:
            gevent.sleep(0.01)
    assert calls[1] - calls[0] > 0.9
    assert calls[2] - calls[1] > 1.8
    assert not any(engine._lanes[0]._scheduler.decode_cost.ms)


def test_an_idle_engine_lets_time_pass_between_two_tries_of_the_same_calls(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def unsteady(_: Runner, rows: int) -> Timing:
        if rows == 2:
            tries.append(time.monotonic())
        return Timing(rows, 0.0, 10**9 >> len(tries) if rows == 2 else 1_000_000)

    monkeypatch.setattr(lane, "_MEASURING_MS", 1e9)
    monkeypatch.setattr(Runner, "measure", unsteady)
    with gevent.Timeout(30):
        while len(tries) < 5:
            gevent.sleep(0.01)
    assert tries[4] - tries[3] > 0.9 * lane._PATIENCE_S, "two tries at once"


def test_drafts_change_no_answer_whether_they_come_true_or_not(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy.gguf", ToyShape(layers=1))  # it says much again, and then something else
    requests = [ask(i, max_tokens=300, length=20) for i in range(4)]
    for plain in _checked(open_engine(tmp_path / "toy.gguf", speculation=False)):
        expected = [answer(plain, request) for request in requests]
    for drafting in _checked(open_engine(tmp_path / "toy.gguf")):
        drafting._lanes[0]._scheduler.decode_cost = DecodeCost(SLOTS, [0, *[1.0] * 16])  # where rows cost nothing
        streams = [drafting.submit(request) for request in requests]
        assert ["".join(delta.text for delta in stream) for stream in streams] == expected
        assert drafting._tally.drafts_accepted > 20, "nothing was quoted"


@pytest.mark.parametrize("shape", ["gemma3", "mamba"])
def test_where_a_state_cannot_be_cut_nothing_is_drafted(toys: dict[str, Path], shape: str) -> None:
    for engine in _checked(open_engine(toys[shape])):
        stream = engine.submit(ask(1))
        list(stream)
        assert stream._sequence.drafter is None


def test_a_model_that_computes_no_number_ends_its_answer_with_an_error(toys: dict[str, Path], tmp_path: Path) -> None:
    ones, nothing = np.ones(LLAMA.width, np.float32), np.full(LLAMA.width, np.nan, np.float32)
    path = tmp_path / "nan.gguf"
    path.write_bytes(toys["llama"].read_bytes().replace(ones.tobytes(), nothing.tobytes()))
    engine = open_engine(path)
    with pytest.raises(InternalError, match="no finite numbers"):
        list(engine.submit(ask(1)))
    engine.close()


def test_a_prompt_whose_numbers_are_none_fails_alone(tmp_path: Path) -> None:
    """One token of the vocabulary stands for nothing that can be computed with."""
    path, bad = write_toy(tmp_path / "hole.gguf"), 300
    data = path.read_bytes()
    table = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    row = table.data[bad].tobytes()
    start = data.index(row)
    path.write_bytes(data[:start] + np.full(LLAMA.width, np.nan, np.float32).tobytes() + data[start + len(row) :])
    for engine in _checked(open_engine(path)):
        alone = answer(engine, ask(1, max_tokens=100))
        other = gevent.spawn(answer, engine, ask(1, max_tokens=100))
        for _ in range(2):  # what it computed is nothing that another one may take over
            with pytest.raises(InternalError, match="no finite numbers"):
                list(engine.submit(replace(ask(2), prompt=(*prompt(2), bad))))
        assert other.get() == alone
