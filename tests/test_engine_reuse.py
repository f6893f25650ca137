"""What was computed once is not computed again, and nobody can tell from the text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gevent
import pytest

from rustllama import gguf
from rustllama.core import Delta, GenerateRequest, LoadOptions, MemoryPlan, SamplingParams, Span, Usage
from rustllama.engine.engine import LlamaEngine, LlamaEngines
from rustllama.engine.native import Context, Model
from rustllama.engine.prefix_store import PrefixStore
from rustllama.engine.recall import Recall
from rustllama.engine.sequence import Sequence
from rustllama.engine.states import WORTH_REUSING, Cuts, Saved, Shape, as_tokens, common_prefix
from rustllama.engine.tally import Source
from rustllama.settings import Settings
from tests.conftest import SHAPES
from tests.test_engine_lane import N_CTX, SLOTS, _checked, open_engine, record, until_idle

GREEDY = SamplingParams(temperature=0)
EVEN = 0.001  # of logits around 7; chunks of other sizes change them by up to 0.00004, an f16 cache by 0.005
SHAPE = Shape("digest", N_CTX, SLOTS, "off", "f32")


def other_shapes(shape: Shape) -> list[Shape]:
    """One for each thing that shapes a state; the digest begins alike."""
    return [
        shape._replace(digest=f"{shape.digest} other"),
        shape._replace(n_ctx=1),
        shape._replace(n_slots=1),
        shape._replace(flash_attention="on"),
        shape._replace(kv_cache_type="f16"),
    ]


@pytest.fixture(params=SHAPES)
def toy(request: pytest.FixtureRequest, toys: dict[str, Path]) -> Path:
    return toys[request.param]


@pytest.fixture
def llama(toys: dict[str, Path]) -> Iterator[LlamaEngine]:
    yield from _checked(open_engine(toys["llama"]))


def said(seed: int, length: int) -> tuple[int, ...]:
    """Tokens by chance, the same for the same seed."""
    return tuple(random.Random(seed).choices(range(3, 500), k=length))


def request(prompt: tuple[int, ...], max_tokens: int = 12) -> GenerateRequest:
    return GenerateRequest("r", prompt, num_ctx=N_CTX, max_tokens=max_tokens, sampling=GREEDY)


def finish(engine: LlamaEngine, asked: GenerateRequest) -> tuple[str, Usage]:
    deltas = list[Delta](engine.submit(asked))
    assert deltas[-1].usage is not None
    return "".join(delta.text for delta in deltas), deltas[-1].usage


def cached(engine: LlamaEngine, prompt: tuple[int, ...]) -> int:
    used = finish(engine, request(prompt, 1))[1].cached_tokens
    until_idle(engine)
    return used


def written(engine: LlamaEngine, asked: GenerateRequest) -> tuple[int, ...]:
    """Prompt and answer, as tokens."""
    stream = engine.submit(asked)
    list(stream)
    return tuple(stream._sequence.tokens)


def assert_a_fresh_engine_agrees(toy: Path, ended: list[Sequence]) -> None:
    """One by one and with nothing reused these requests have the same answers, or such as part where two tokens are as
    good as even: chunks of other sizes round otherwise.
    """
    engine = open_engine(toy, prompt_cache_memory=0)
    given = [tuple(sequence.tokens) for sequence in ended]
    others = [written(engine, replace(sequence.request, num_ctx=N_CTX)) for sequence in ended]
    engine.close()
    parted = [pair for pair in zip(given, others, strict=True) if pair[0] != pair[1]]
    uneven = [spread for one, other in parted if (spread := behind_the_best(toy, one, other)) >= EVEN]
    assert uneven == [], "answers part where one token is clearly better"


def behind_the_best(toy: Path, one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """How far the logits of the first tokens that differ are below the highest, computed as the engines do."""
    place = common_prefix(as_tokens(one), as_tokens(other))
    model = Model(str(toy))
    context = Context(
        model, n_ctx=N_CTX, n_slots=1, n_batch=N_CTX, n_threads=1, flash_attention="off", kv_cache_type="f32"
    )
    context.decode(one[:place], range(place), [0] * place, [row == place - 1 for row in range(place)])
    logits = context.logits(place - 1)
    context.close()
    model.close()
    return float(logits.max() - min(logits[one[place]], logits[other[place]]))


def test_a_prompt_takes_over_what_an_earlier_one_had_in_common(llama: LlamaEngine) -> None:
    common = said(1, 50)
    assert [cached(llama, common + said(seed, 10)) for seed in (2, 3)] == [0, 50]


def test_the_last_token_of_a_prompt_is_always_computed(llama: LlamaEngine) -> None:
    assert [cached(llama, said(1, 50)) for _ in range(2)] == [0, 49]


def test_a_few_tokens_are_not_worth_a_copy(llama: LlamaEngine) -> None:
    common = said(1, 10)
    assert [cached(llama, common + said(seed, 50)) for seed in (2, 3)] == [0, 0]


def test_prompts_that_come_together_compute_their_common_prefix_once(toy: Path) -> None:
    prompts = [said(1, 100) + said(10 + i, 10) for i in range(SLOTS)]
    for engine in _checked(open_engine(toy)):
        streams = [engine.submit(request(prompt)) for prompt in prompts]
        usages = [list(stream)[-1].usage for stream in streams]
        assert sorted(usage.cached_tokens for usage in usages if usage) == [0] + [100] * (SLOTS - 1)
    assert_a_fresh_engine_agrees(toy, [stream._sequence for stream in streams])


def test_a_conversation_goes_on_from_its_last_state(toy: Path) -> None:
    for engine in _checked(open_engine(toy)):
        tokens = written(engine, request(said(1, 40)))
        until_idle(engine)
        stream = engine.submit(request(tokens + said(2, 10)))
        usage = list(stream)[-1].usage
        assert usage is not None
        assert usage.cached_tokens == len(tokens) - 1
    assert_a_fresh_engine_agrees(toy, [stream._sequence])


def test_the_next_turn_goes_on_in_the_same_slot(toy: Path) -> None:
    for engine in _checked(open_engine(toy)):
        turns = [engine.submit(request(said(1, 40)))]
        for seed in range(2, 6):
            list(turns[-1])
            turns.append(engine.submit(request((*turns[-1]._sequence.tokens, *said(seed, 10)))))
        list(turns[-1])
        assert engine._tally.prompts == {Source.COMPUTED: 1, Source.RUNNING: 4}
        assert all(b._sequence.cached == a._sequence.computed for a, b in itertools.pairwise(turns))
        until_idle(engine)
        assert len(list(engine._shared.store)) == 1, "only what nobody went on from was saved"
    assert_a_fresh_engine_agrees(toy, [turn._sequence for turn in turns])


def test_another_prompt_leaves_what_ended_to_others(llama: LlamaEngine) -> None:
    tokens = written(llama, request(said(1, 40)))
    finish(llama, request(tokens[:30] + said(2, 20)))
    assert cached(llama, (*tokens, 7)) == len(tokens) - 1


def test_a_border_that_came_back_is_kept_where_states_cannot_be_cut(toys: dict[str, Path]) -> None:
    for engine in _checked(open_engine(toys["mamba"])):
        common = said(1, 60)
        both = [gevent.spawn(finish, engine, request(common + said(seed, 10))) for seed in (2, 3)]
        gevent.joinall(both, raise_error=True)
        until_idle(engine)
        assert cached(engine, common + said(4, 10)) == 60


def test_a_conversation_that_goes_on_at_once_has_its_state_while_others_run_too(toy: Path) -> None:
    for engine in _checked(open_engine(toy)):
        other = engine.submit(request(said(9, 20), 200))
        tokens = written(engine, request(said(1, 40)))
        assert finish(engine, request(tokens + said(2, 5)))[1].cached_tokens == len(tokens) - 1
        other.cancel()


def test_owners_share_nothing(llama: LlamaEngine) -> None:
    asked = [replace(request((*said(1, 60), seed), 20), owner=owner) for seed, owner in enumerate("aabb")]
    streams = [llama.submit(request) for request in asked]
    usages = [list(stream)[-1].usage for stream in streams]
    assert [usage.cached_tokens for usage in usages if usage] == [0, 60, 0, 60], "while they run"
    later = [finish(llama, replace(request((*said(1, 60), 7)), owner=owner))[1] for owner in "abc"]
    assert [usage.cached_tokens for usage in later] == [60, 60, 0], "what is kept"


def test_what_a_model_wrote_for_one_owner_is_tokens_for_no_other(llama: LlamaEngine) -> None:
    letters = tuple(token for letter in "let us see it again" for token in spelled(llama, letter))
    finish(llama, replace(request(letters, 1), owner="a"))
    span = (Span("let us see it again", trusted=False),)
    found = [llama.tokenize(span, add_special=False, owner=owner) == letters for owner in ("a", "b", "")]
    assert found == [True, False, False]


def test_an_unload_forgets_nothing(toy: Path) -> None:
    engines = LlamaEngines(Settings(flash_attention="off", kv_cache_type="f32", num_thread=1))
    counts = []
    for _ in range(2):
        engine = engines(record(toy), LoadOptions(), MemoryPlan(N_CTX, SLOTS, 0))
        counts.append(finish(engine, request((*said(1, 40), 5), 1))[1].cached_tokens)
        engine.close()
    assert counts[0] == 0
    assert counts[1] == Cuts.of(gguf.read(toy)).usable(held=41, shared=40)


def spelled(engine: LlamaEngine, text: str, *, trusted: bool = False) -> tuple[int, ...]:
    return engine.tokenize((Span(text, trusted=trusted),), add_special=False)


def test_what_a_model_wrote_is_taken_as_the_tokens_it_wrote(llama: LlamaEngine) -> None:
    text = "let us see " * 4
    letters = tuple(token for letter in text for token in spelled(llama, letter))
    assert len(letters) > len(spelled(llama, text)), "the toy spells it in one way only"
    question = spelled(llama, "<|im_start|>", trusted=True)
    finish(llama, request(question + letters, 1))
    until_idle(llama)
    again = spelled(llama, f"<|im_start|>{text}<|im_end|>", trusted=True)
    assert again[:-1] == question + letters
    assert cached(llama, again) == len(again) - 1
    assert spelled(llama, text) != letters, "only where the conversation is the same"


def test_a_setting_turns_reuse_by_text_off(toys: dict[str, Path]) -> None:
    for engine in _checked(open_engine(toys["llama"], reuse_text=False)):
        letters = tuple(token for letter in "let us see it again" for token in spelled(engine, letter))
        finish(engine, request(letters, 1))
        until_idle(engine)
        assert spelled(engine, "let us see it again") != letters


PIECES = {1: b"a", 2: b"b", 3: b"ab", 4: b"", 5: None, 9: None}


@pytest.mark.parametrize(
    ("known", "text", "found"),
    [
        ([9, 1, 2, 3], b"ab", [1, 2]),
        ([9, 1, 2], b"abab", [3, 3]),
        ([9, 1, 3], b"aab", [1, 3]),
        ([9, 3, 3], b"aba", [3, 1]),
        ([9, 1, 4, 2], b"ab", [3]),
        ([9, 1, 5, 2], b"ab", [3]),
        ([8, 1, 2], b"ab", [3]),
    ],
)
def test_text_is_followed_token_by_token(known: list[int], text: bytes, found: list[int]) -> None:
    usual = {b"ab": [3], b"abab": [3, 3], b"aab": [1, 3], b"aba": [3, 1]}[text]
    assert Recall([as_tokens(known)], PIECES.get).rewrite([9, *usual, 4]) == [9, *found, 4]


def saved(tokens: tuple[int, ...], shape: Shape = SHAPE) -> Saved:
    return Saved(shape, as_tokens(tokens), len(tokens), memoryview(bytes(100)))


def test_the_common_prefix_of_tokens() -> None:
    assert common_prefix(as_tokens((1, 2, 3)), as_tokens((1, 2, 4, 5))) == 2
    assert common_prefix(as_tokens((1, 2)), as_tokens((1, 2, 4))) == 2
    assert common_prefix(as_tokens(()), as_tokens((1,))) == 0


def test_the_state_used_longest_ago_leaves_first() -> None:
    store = PrefixStore(limit_bytes=250)
    for seed in (1, 2):
        store.put(saved(said(seed, 20)), Cuts())
    assert store.find(SHAPE, Cuts(), as_tokens(said(1, 20)))
    store.put(saved(said(3, 20)), Cuts())
    assert [bool(store.find(SHAPE, Cuts(), as_tokens(said(seed, 20)))) for seed in (1, 2, 3)] == [True, False, True]
    store.check_integrity()


def test_a_longer_state_replaces_the_shorter_one_that_it_contains() -> None:
    store = PrefixStore(limit_bytes=1000)
    store.put(saved(said(1, 20)), Cuts())
    store.put(saved(said(1, 20) + said(2, 20)), Cuts())
    assert len(list(store)) == 1


def test_a_shorter_state_stays_where_the_longer_one_cannot_be_cut() -> None:
    store = PrefixStore(limit_bytes=1000)
    store.put(saved(said(1, 20)), Cuts(recurrent=True))
    store.put(saved(said(1, 20) + said(2, 20)), Cuts(recurrent=True))
    assert len(list(store)) == 2


@pytest.mark.parametrize("other", other_shapes(SHAPE))
def test_a_state_of_another_shape_is_never_found(other: Shape) -> None:
    store = PrefixStore(limit_bytes=1000)
    store.put(saved(said(1, 20), other), Cuts())
    assert store.find(SHAPE, Cuts(), as_tokens(said(1, 20))) is None


@pytest.mark.parametrize("place", [0, 15, 16, 30, 38])
def test_a_state_is_used_for_the_same_tokens_only(place: int) -> None:
    """They are compared one by one: the same tokens in another order, of which any sum is the same, share nothing."""
    tokens = said(1, 40)
    other = (*tokens[:place], tokens[place + 1], tokens[place], *tokens[place + 2 :])
    for cuts, usable in ((Cuts(), place), (Cuts(recurrent=True), 0)):
        store = PrefixStore(limit_bytes=1000)
        store.put(saved(tokens), cuts)
        found = store.find(SHAPE, cuts, as_tokens(other))
        assert (found.count if found else 0) == (usable if usable >= WORTH_REUSING else 0)


def test_forgetting_a_model_leaves_the_others() -> None:
    store = PrefixStore(limit_bytes=1000)
    for digest in "ab":
        store.put(saved(said(1, 20), SHAPE._replace(digest=digest)), Cuts())
    store.forget("a")
    assert [found.shape.digest for found in store] == ["b"]
    store.check_integrity()


@pytest.mark.parametrize(
    ("cuts", "held", "shared", "usable"),
    [
        (Cuts(), 100, 50, 50),
        (Cuts(window=64), 100, 50, 0),
        (Cuts(window=64), 100, 100, 100),
        (Cuts(window=64), 64, 50, 0),
        (Cuts(window=64), 63, 50, 50),
        (Cuts(recurrent=True), 60, 50, 0),
        (Cuts(recurrent=True), 50, 50, 50),
    ],
)
def test_where_states_may_be_cut(cuts: Cuts, held: int, shared: int, usable: int) -> None:
    assert cuts.usable(held, shared) == usable
