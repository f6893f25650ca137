"""The same bits, whatever else runs or ran: on quantized models too, where a batch's shape shows in every answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from rustllama.core import GenerateRequest, LoadOptions, MemoryPlan, SamplingParams, Usage
from rustllama.engine.engine import LlamaEngine, LlamaEngines
from rustllama.settings import Settings
from tests.test_engine_lane import N_CTX, SLOTS, record, until_idle
from tests.test_engine_reuse import said
from tests.toys import ToyShape, write_toy

Written = tuple[tuple[int, ...], bytes]  # all tokens, and the state that computing them left
ANSWER = 20  # tokens


@pytest.fixture(scope="module", params=["Q8_0", "Q4_0"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.gguf"
    write_toy(path, ToyShape(quantization=request.param))
    return path


@pytest.fixture
def engine(quantized: Path) -> Iterator[LlamaEngine]:
    made = LlamaEngines(Settings(num_thread=1))(record(quantized), LoadOptions(), MemoryPlan(N_CTX, SLOTS, 0))
    yield made
    until_idle(made)
    made.check_integrity()
    made.close()


def sampled(prompt: tuple[int, ...], *, reproducible: bool = True, seed: int = 7) -> GenerateRequest:
    params = SamplingParams(temperature=1.0, seed=seed)
    return GenerateRequest("r", prompt, N_CTX, max_tokens=ANSWER, sampling=params, reproducible=reproducible)


def run(engine: LlamaEngine, asked: GenerateRequest) -> tuple[tuple[int, ...], Usage]:
    stream = engine.submit(asked)
    usage = list(stream)[-1].usage
    assert usage is not None
    return tuple(stream._sequence.tokens), usage


def written(engine: LlamaEngine, asked: GenerateRequest) -> Written:
    """Alone, with nothing remembered."""
    engine._shared.store.forget("")
    tokens, _ = run(engine, asked)
    until_idle(engine)
    return tokens, state_of(engine, tokens)


def state_of(engine: LlamaEngine, tokens: tuple[int, ...]) -> bytes:
    """What was saved, as it is written from slot 0: a state names the slot that it came from."""
    state = next(saved.state for saved in engine._shared.store if tuple(saved.tokens) == tokens)
    context = engine._lanes[0]._context

    def moved() -> bytes:
        assert context.restore(0, state, len(tokens) - 1)
        written = bytes(context.save(0))
        context.clear(0)
        return written

    return engine._shared.native.call(moved)


def together(engine: LlamaEngine, asked: list[GenerateRequest]) -> list[tuple[tuple[int, ...], Usage]]:
    engine._shared.store.forget("")
    running = [gevent.spawn(run, engine, request) for request in asked]
    gevent.joinall(running, raise_error=True)
    until_idle(engine)
    return [greenlet.get() for greenlet in running]


def crowd(engine: LlamaEngine, seed: int) -> None:
    """Answers of others, one after another, some of them with the same beginning; some are given up."""
    rng = random.Random(seed)
    for number in range(6):
        prompt = said(rng.choice((1, 2, seed)), rng.randint(10, 120)) + said(1000 * seed + number, 5)
        stream = engine.submit(sampled(prompt, reproducible=False))
        if rng.random() < 0.3:
            gevent.sleep(0.001)
            stream.cancel()
        else:
            list(stream)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_an_answer_is_the_same_to_the_last_bit_in_any_crowd(engine: LlamaEngine, length: int) -> None:
    asked = sampled(said(1, length))
    alone = written(engine, asked)
    for seed in range(3):
        engine._shared.store.forget("")
        others = [gevent.spawn(crowd, engine, 10 * seed + i) for i in range(5)]
        gevent.sleep(0.003 * seed)
        tokens, _ = run(engine, asked)
        gevent.joinall(others, raise_error=True)
        until_idle(engine)
        assert (tokens, state_of(engine, tokens)) == alone


def test_a_crowd_shows_in_an_answer_that_did_not_ask_for_the_same_bits(engine: LlamaEngine) -> None:
    """Or the test above would prove nothing."""
    asked = [sampled(said(seed, 100), reproducible=False) for seed in range(SLOTS)]
    alone = [written(engine, request) for request in asked]
    assert [(tokens, state_of(engine, tokens)) for tokens, _ in together(engine, asked)] != alone


def test_what_is_reused_is_exact(engine: LlamaEngine) -> None:
    asked = sampled(said(1, 100) + said(2, 40))
    alone = written(engine, asked)
    engine._shared.store.forget("")
    run(engine, sampled(said(1, 100) + said(3, 20)))
    until_idle(engine)
    tokens, usage = run(engine, asked)
    until_idle(engine)
    assert usage.cached_tokens == 96, "whole chunks of the common beginning"
    assert (tokens, state_of(engine, tokens)) == alone


def test_what_others_computed_is_not_reused(engine: LlamaEngine) -> None:
    run(engine, sampled(said(1, 100), reproducible=False))
    until_idle(engine)
    assert run(engine, sampled(said(1, 100)))[1].cached_tokens == 0


def test_others_reuse_what_was_computed_reproducibly(engine: LlamaEngine) -> None:
    run(engine, sampled(said(1, 100)))
    until_idle(engine)
    assert run(engine, sampled(said(1, 100), reproducible=False))[1].cached_tokens == 99


def test_prompts_that_come_together_share_whole_chunks(engine: LlamaEngine) -> None:
    asked = [sampled(said(1, 100) + said(i, 20)) for i in (2, 3)]
    alone = [written(engine, request) for request in asked]
    both = together(engine, asked)
    assert [usage.cached_tokens for _, usage in both] == [0, 96]
    assert [(tokens, state_of(engine, tokens)) for tokens, _ in both] == alone
