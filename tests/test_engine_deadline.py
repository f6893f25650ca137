"""A request whose time is up ends once, with what it has, wherever it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from rustllama import gguf
from rustllama.core import Delta, FinishReason
from rustllama.engine.batch import Batch, Clear
from rustllama.engine.engine import LlamaEngine
from rustllama.engine.sequence import Sequence
from rustllama.settings import FOREVER
from tests.conftest import SHAPES
from tests.test_engine_lane import N_CTX, _checked, answer, ask, open_engine, until_idle
from tests.test_engine_reuse import assert_a_fresh_engine_agrees, request, said
from tests.test_engine_scheduler import Outlet, scheduler, sequence, step
from tests.toys import write_toy

LIMIT_MS = 7_000_000


def outcome(ended: Sequence) -> Delta:
    """The one terminal event."""
    assert isinstance(ended.outlet, Outlet)
    (event,) = ended.outlet
    assert isinstance(event, Delta)
    assert event.finish is FinishReason.LENGTH
    assert "time limit" in event.warnings[0]
    return event


@pytest.fixture
def engine(toys: dict[str, Path]) -> Iterator[LlamaEngine]:
    yield from _checked(open_engine(toys["llama"]))


def test_in_the_queue_it_ends_with_an_empty_answer_and_never_runs() -> None:
    made, running, waiting = scheduler(n_slots=1), sequence(4), sequence(4)
    for s in (running, waiting):
        made.add(s)
    step(made)
    made.expire(waiting, now_ns=LIMIT_MS)
    end = outcome(waiting)
    assert end.usage is not None
    assert (end.text, end.usage.queue_ns, end.usage.prompt_ns, end.usage.completion_tokens) == ("", LIMIT_MS, 0, 0)
    assert [call.sequences for call in step(made).decode] == [(running,)]
    assert not made.queue


def test_in_its_prompt_it_ends_with_an_empty_answer_and_frees_its_slot() -> None:
    made, one = scheduler(n_batch=32), sequence(100)
    made.add(one)
    step(made, now_ns=1_000_000)
    made.expire(one, now_ns=LIMIT_MS)
    end = outcome(one)
    assert end.usage is not None
    assert (end.text, end.usage.queue_ns, end.usage.prompt_ns) == ("", 1_000_000, LIMIT_MS - 1_000_000)
    assert made.plan(2) == Batch((Clear(0, one),), (), ())


def test_in_its_answer_it_ends_with_the_next_token() -> None:
    one = sequence(4)
    one.accept(7, b"a", 1)
    made = scheduler()
    made.add(one)
    step(made)
    made.expire(one, now_ns=LIMIT_MS)
    assert one.outlet == Outlet()
    end = one.accept(7, b"b", 2)
    assert (end.text, end.finish, len(end.warnings)) == ("b", FinishReason.LENGTH, 1)
    assert one.over


def test_an_answer_that_stops_by_itself_has_no_warning() -> None:
    one, made = sequence(4), scheduler()
    made.add(one)
    step(made)
    made.expire(one, now_ns=LIMIT_MS)
    end = one.accept(7, None, 2)
    assert (end.finish, end.warnings) == (FinishReason.STOP, ())


def test_what_is_over_does_not_end_again() -> None:
    made, one = scheduler(), sequence(4)
    made.add(one)
    made.expire(one, now_ns=LIMIT_MS)
    made.expire(one, now_ns=LIMIT_MS)
    made.cancel(one)
    outcome(one)


def test_a_stream_keeps_the_text_that_it_has(engine: LlamaEngine) -> None:
    whole = answer(engine, ask(1, max_tokens=100))
    stream = engine.submit(ask(1, max_tokens=None))
    deltas = iter(stream)
    text = next(deltas).text
    stream._lane._expire(stream._sequence)
    rest = list(deltas)
    text += "".join(delta.text for delta in rest)
    assert text
    assert whole.startswith(text)
    assert (rest[-1].finish, len(rest[-1].warnings)) == (FinishReason.LENGTH, 1)


def test_the_limit_of_the_settings_ends_a_request_by_itself(toys: dict[str, Path]) -> None:
    for engine in _checked(open_engine(toys["llama"], request_timeout=1e-6)):
        streams = [engine.submit(ask(i, max_tokens=None)) for i in range(8)]
        ends = [list(stream)[-1] for stream in streams]
        assert {end.finish for end in ends} == {FinishReason.LENGTH}
        assert all("time limit" in end.warnings[0] for end in ends)


@pytest.mark.parametrize("none", [0.0, FOREVER, 10.0**12])
def test_no_limit_or_a_long_one_ends_nothing(toys: dict[str, Path], none: float) -> None:
    for engine in _checked(open_engine(toys["llama"], request_timeout=none)):
        stream = engine.submit(ask(1, max_tokens=3))
        assert list(stream)[-1].warnings == ()
        stream.cancel()


@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_that_ends_in_the_middle_of_a_call_keeps_the_calls_before(name: str, tmp_path: Path) -> None:
    """A recurrent state, which llama.cpp cannot take back, is not kept."""
    wide = write_toy(tmp_path / "wide.gguf", SHAPES[name], width=512, feed_forward=2048, vocabulary=2048)
    asked = request(said(1, N_CTX - 20), 8)
    for engine in _checked(open_engine(wide, num_batch=128)):
        stream = engine.submit(asked)
        while not (engine._lanes[0]._runner._alone and stream._sequence.computed):
            gevent.sleep(0.001)
        stream._lane._expire(stream._sequence)
        assert [delta.text for delta in stream] == [""]
        until_idle(engine)
        again = engine.submit(asked)
        usage = list(again)[-1].usage
        assert usage is not None
        assert usage.cached_tokens > 0 or gguf.read(wide).recurrent_state_bytes
    assert_a_fresh_engine_agrees(wide, [again._sequence])
