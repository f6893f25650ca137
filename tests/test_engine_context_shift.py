"""A full context goes on without its oldest turns: the right cells go, nobody else notices, nothing of it is reused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import pytest

from rustllama import gguf
from rustllama.core import ContextShift, FinishReason, GenerateRequest
from rustllama.engine.context_shift import after, cut, leaves_room, of_chat
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.engine import LlamaEngine
from rustllama.engine.native import Context, Model
from rustllama.errors import Unsupported
from rustllama.gguf.architectures import can_shift
from tests.conftest import SHAPES
from tests.test_engine_lane import SLOTS, _checked, answer, ask, open_engine, until_idle
from tests.test_engine_reuse import cached, finish, said
from tests.test_engine_scheduler import sequence
from tests.toys import LLAMA, write_toy

NUM_CTX = 96
WAYS = {
    "raw": ContextShift(20),
    "turns": ContextShift(8, (20, 40), 60),
    "question": ContextShift(8, (), 40),
    "long question": ContextShift(8, (), 80),
}


@pytest.fixture
def engine(toys: dict[str, Path]) -> Iterator[LlamaEngine]:
    yield from _checked(open_engine(toys["llama"]))


def shifting(seed: int, shift: ContextShift, max_tokens: int = 300, stop: tuple[str, ...] = ()) -> GenerateRequest:
    return replace(ask(0, max_tokens, stop=stop), prompt=said(seed, 80), num_ctx=NUM_CTX, shift=shift)


@pytest.mark.parametrize(
    ("shift", "gone"),
    [
        (ContextShift(4), (4, 50)),
        (ContextShift(90), (90, 93)),
        (ContextShift(10, (30, 60, 80), 90), (10, 60)),
        (ContextShift(10, (30, 40), 50), (10, 40)),
        (ContextShift(10, (), 50), (50, 73)),
        (ContextShift(10, (), 72), (72, 84)),
        (ContextShift(10, (), 90), (10, 53)),
        (ContextShift(50, (), 50), (50, 73)),
    ],
)
def test_half_of_what_may_go_goes_and_whole_turns_before_the_last_question(
    shift: ContextShift, gone: tuple[int, int]
) -> None:
    assert cut(shift, held=96) == gone


def test_turns_that_are_left_keep_their_borders() -> None:
    shift = ContextShift(10, (30, 60, 80), 90)
    assert after(shift, 10, 60) == ContextShift(10, (30,), 40)
    assert after(after(shift, 10, 60), 10, 30) == ContextShift(10, (), 20)
    assert after(ContextShift(10, (), 20), 20, 50) == ContextShift(10, (), 20)
    assert after(ContextShift(10, (), 90), 10, 53) == ContextShift(10, (), 47)
    assert after(ContextShift(10, (), 30), 10, 53) == ContextShift(10, (), 10)


def test_every_shift_frees_a_good_part_of_the_context() -> None:
    """Or each of many tokens would move the whole cache."""
    for keep in range(73):
        for question_end in range(keep, 96):
            start, end = cut(ContextShift(keep, (), question_end), held=96)
            assert keep <= start < end <= 96
            assert end - start >= 96 // 8
    assert leaves_room(72, 96)
    assert not leaves_room(73, 96)


HEAD, OPEN, CLOSE = (0, 1, 50, 9, 2, 9), (1, 51, 9), (2, 9)  # a system message; what begins and ends a question
ANSWER = (1, 52, 9)


def turn(*words: int) -> tuple[int, ...]:
    return (*OPEN, *words, *CLOSE, *ANSWER, 80, 81, *CLOSE)


CHAT = (*HEAD, *turn(60), *turn(61, 62), *OPEN, 63, 64, *CLOSE, *ANSWER)
ASKED = (*HEAD, *OPEN, 99, *CLOSE, *ANSWER)
ASKED_AGAIN = (*HEAD, *OPEN, 99, *CLOSE, *ANSWER, 98, *CLOSE, *OPEN, 99, *CLOSE, *ANSWER)


@pytest.mark.parametrize(
    ("num_keep", "keep", "turns"), [(0, 9, (22, 36)), (9, 9, (22, 36)), (10, 22, (36,)), (30, 36, ()), (44, 36, ())]
)
def test_the_turns_of_a_chat_are_found_by_how_they_begin(num_keep: int, keep: int, turns: tuple[int, ...]) -> None:
    assert of_chat(CHAT, ASKED, ASKED_AGAIN, num_keep) == ContextShift(keep, turns, len(CHAT))
    assert {CHAT[place - 3 : place] for place in (keep, *turns)} == {OPEN}


def test_num_keep_minus_one_keeps_the_whole_prompt() -> None:
    assert of_chat(CHAT, ASKED, ASKED_AGAIN, -1) == ContextShift(len(CHAT), (), len(CHAT))


def test_a_chat_of_one_question_has_no_turns_to_drop() -> None:
    one = (*HEAD, *OPEN, 63, *CLOSE, *ANSWER)
    assert of_chat(one, ASKED, ASKED_AGAIN) == ContextShift(9, (), len(one))


def test_counts_go_on_over_a_shift() -> None:
    one = sequence(10)
    one.request = replace(one.request, num_ctx=16)
    one.shift = ContextShift(2)
    one.computed = 16
    for token in range(7):
        one.accept(100 + token, b"x", 1)
    assert one.is_full
    assert one.make_room() == (2, 9)
    assert (one.tokens, one.computed, one.dropped) == ([1, 2, 10, *range(100, 107)], 9, 7)
    assert (one.answered, one.is_full) == (7, False)


@pytest.mark.parametrize("way", WAYS)
def test_a_shifted_answer_is_that_of_a_fresh_context_with_the_tokens_that_are_left(way: str, tmp_path: Path) -> None:
    """In a model of one layer, a key and a value are of a token and its place alone, whatever was before it."""
    toy = write_toy(tmp_path / "one.gguf", LLAMA, layers=1)
    for engine in _checked(open_engine(toy, prompt_cache_memory=0)):
        for max_tokens in range(30, 130, 33):
            stream = engine.submit(shifting(1, WAYS[way], max_tokens))
            assert list(stream)[-1].finish is FinishReason.LENGTH
            left = tuple(stream._sequence.tokens)
            assert left[: WAYS[way].keep] == said(1, 80)[: WAYS[way].keep]
            fresh = engine.submit(replace(ask(0, 1), prompt=left[:-1]))
            list(fresh)
            assert fresh._sequence.tokens[-1] == left[-1]


def logits_of(model: Model, tokens: tuple[int, ...], gone: tuple[int, int] | None = None) -> Any:
    """Of the last token, computed when the others are there and some of them gone; and of a second sequence's."""
    context = Context(model, n_ctx=256, n_slots=2, n_batch=256, n_threads=1, flash_attention="off", kv_cache_type="f32")
    others, count = said(9, 50), len(tokens) - 1
    slots = [0] * count + [1] * 50
    context.decode([*tokens[:-1], *others], [*range(count), *range(50)], slots, False)
    if gone is not None:
        context.drop(0, *gone)
        count -= gone[1] - gone[0]
    context.decode([tokens[-1], others[-1]], [count, 50], [0, 1], True)
    found = np.stack([context.logits(0), context.logits(1)])
    context.close()
    return found


@pytest.mark.parametrize("gone", [(20, 58), (1, 2), (0, 90), (94, 95)])
def test_cells_that_close_the_gap_are_as_if_computed_there(gone: tuple[int, int], tmp_path: Path) -> None:
    """In a model of one layer, a key and a value are of a token and its place alone, whatever was before it."""
    model = Model(str(write_toy(tmp_path / "one.gguf", LLAMA, layers=1)))
    tokens = said(1, 96)
    left = tokens[: gone[0]] + tokens[gone[1] :]
    shifted, fresh, whole = logits_of(model, tokens, gone), logits_of(model, left), logits_of(model, tokens)
    assert np.allclose(shifted[0], fresh[0], atol=1e-4)
    assert not np.allclose(shifted[0], whole[0], atol=1e-3)
    assert np.array_equal(shifted[1], whole[1]), "another sequence noticed it"
    model.close()


def test_answers_that_shift_and_answers_that_do_not_are_as_alone(engine: LlamaEngine) -> None:
    """Others come and go, so that shifted states are moved to other slots."""
    requests = [shifting(i, list(WAYS.values())[i % 4], 60 + 25 * i) for i in range(8)]
    requests += [replace(ask(i, 20 * i), num_ctx=NUM_CTX + 16 * i) for i in range(1, 5)]
    alone = [answer(engine, request) for request in requests]
    until_idle(engine)
    together = [gevent.spawn(answer, engine, request) for request in requests]
    assert [greenlet.get() for greenlet in together] == alone


def test_a_shifted_answer_ends_as_others_do_and_tells_what_was_dropped(engine: LlamaEngine) -> None:
    whole = answer(engine, shifting(1, WAYS["raw"]))
    stop = whole[-40:-34]
    deltas = list(engine.submit(shifting(1, WAYS["raw"], stop=(stop,))))
    assert "".join(delta.text for delta in deltas) == whole.split(stop)[0]
    assert deltas[-1].finish is FinishReason.STOP
    dropped = engine.submit(shifting(1, WAYS["raw"]))
    end = list(dropped)[-1]
    assert end.usage is not None
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (80, 300)
    assert end.warnings == (f"{dropped._sequence.dropped} tokens were dropped to go on in a context of {NUM_CTX}",)
    assert len(dropped._sequence.tokens) <= NUM_CTX + 1


def test_the_context_of_a_request_that_names_a_whole_slot_shifts_too(engine: LlamaEngine) -> None:
    request = replace(shifting(1, ContextShift(20), 1200), num_ctx=512)
    assert finish(engine, request)[1].completion_tokens == 1200


def test_nothing_is_reused_of_a_sequence_that_was_shifted(engine: LlamaEngine) -> None:
    finish(engine, shifting(1, WAYS["raw"]))
    until_idle(engine)
    assert len(list(engine._shared.store)) == 0
    assert cached(engine, said(1, 80)) == 0


def test_a_running_sequence_that_was_shifted_leads_nobody(engine: LlamaEngine) -> None:
    stream = engine.submit(shifting(1, WAYS["raw"], 10_000))
    deltas = iter(stream)
    while not stream._sequence.dropped:
        next(deltas)
    usage = finish(engine, replace(ask(1, 1), prompt=said(1, 70)))[1]
    stream.cancel()
    assert usage.cached_tokens == 0


def test_a_prompt_that_shifts_later_is_reused_until_then_and_may_reuse(engine: LlamaEngine) -> None:
    finish(engine, replace(ask(1, 1), prompt=said(1, 80)))
    until_idle(engine)
    assert finish(engine, shifting(1, WAYS["raw"], 5))[1].cached_tokens == 79
    until_idle(engine)
    assert cached(engine, said(1, 80)) == 79


def test_drafts_change_nothing_of_a_shifted_answer(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy.gguf", LLAMA, layers=1)  # it says much again, and then something else
    requests = [replace(shifting(i, way, 600), num_ctx=256) for i, way in enumerate(WAYS.values())]
    for plain in _checked(open_engine(toy, speculation=False)):
        expected = [answer(plain, request) for request in requests]
    for drafting in _checked(open_engine(toy)):
        drafting._lanes[0]._scheduler.decode_cost = DecodeCost(SLOTS, [0, *[1.0] * 16])  # where rows cost nothing
        streams = [drafting.submit(request) for request in requests]
        assert ["".join(delta.text for delta in stream) for stream in streams] == expected
        assert drafting._tally.drafts_accepted > 20, "nothing was quoted"
        assert all(stream._sequence.dropped for stream in streams)


def test_a_reproducible_answer_is_not_shifted(engine: LlamaEngine) -> None:
    with pytest.raises(Unsupported, match="reproducible"):
        engine.submit(replace(shifting(1, WAYS["raw"]), reproducible=True))


@pytest.mark.parametrize("name", sorted({*SHAPES} - {"llama"}))
def test_where_it_would_be_wrong_it_is_refused(toys: dict[str, Path], name: str) -> None:
    for engine in _checked(open_engine(toys[name])):
        with pytest.raises(Unsupported, match="'shift' is not possible with this model"):
            engine.submit(shifting(1, WAYS["raw"]))


@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({}, True),
        ({"architecture": "qwen2vl"}, False),
        ({"architecture": "smollm3"}, False),
        ({"sliding_window": 1024}, False),
        ({"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}}, True),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, False),
        ({"metadata": {"llama.rope.scaling.attn_factor": 1.19}}, False),
    ],
)
def test_which_models_can_shift(toys: dict[str, Path], changes: dict[str, object], can: bool) -> None:
    assert can_shift(replace(gguf.read(toys["llama"]), **changes)) is can  # type: ignore[arg-type]
