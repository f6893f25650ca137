"""Which samplers a request needs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import llama_cpp
import pytest

from rustllama.core import SamplingParams
from rustllama.engine.native import Context, Model, Sampler
from rustllama.engine.sampling import chain, penalized_tokens


def names(params: SamplingParams) -> list[str]:
    return [stage.name for stage in chain(params, vocabulary_size=100, context_length=64)]


def test_the_defaults_are_ollamas() -> None:
    assert names(SamplingParams()) == ["top_k", "top_p", "temp", "dist"]


def test_temperature_zero_is_greedy_and_draws_nothing() -> None:
    assert names(SamplingParams(temperature=0, top_k=5)) == ["greedy"]


def test_every_stage_stands_in_llama_cpps_order() -> None:
    params = SamplingParams(min_p=0.1, typical_p=0.5, repeat_penalty=1.1)
    assert names(params) == ["penalties", "top_k", "typical", "top_p", "min_p", "temp", "dist"]


def test_a_seed_is_passed_on_and_none_is_drawn_anew() -> None:
    seeded = chain(SamplingParams(seed=7), vocabulary_size=9, context_length=9)
    assert seeded[-1].arguments == (7,)
    random = {chain(SamplingParams(), vocabulary_size=9, context_length=9)[-1].arguments for _ in range(9)}
    assert len(random) > 1


@pytest.mark.parametrize(("last_n", "expected"), [(64, 64), (-1, 500), (0, 0), (9999, 500)])
def test_penalties_look_back_within_the_context(last_n: int, expected: int) -> None:
    params = SamplingParams(repeat_last_n=last_n, presence_penalty=0.5)
    assert penalized_tokens(params, 500) == expected


def test_without_a_penalty_no_tokens_are_remembered() -> None:
    assert penalized_tokens(SamplingParams(repeat_last_n=64), 500) == 0


def test_the_likeliest_token_is_llama_cpps(toys: dict[str, Path]) -> None:
    prompt = range(5, 13)
    with (
        closing(Model(str(toys["llama"]))) as model,
        closing(Context(model, n_ctx=256, n_slots=1, n_batch=32, n_threads=1)) as context,
        closing(
            Sampler(chain(SamplingParams(temperature=0), vocabulary_size=model.n_vocab, context_length=256))
        ) as greedy,
    ):
        context.decode(prompt, range(len(prompt)), [0] * len(prompt), True)
        rows = range(len(prompt))
        found = [context.sample(greedy, row) for row in rows]
        assert found == [llama_cpp.llama_sampler_sample(greedy.handle, context._context, row) for row in rows]
    assert len(set(found)) > 1
