"""Which of llama.cpp's samplers a request needs, in which order. Pure: `native` builds the chain."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from rustllama.core import SamplingParams


@dataclass(frozen=True, slots=True)
class Stage:
    """One sampler: the end of `llama_sampler_init_<name>` and its arguments."""

    name: str
    arguments: tuple[int | float, ...]


def chain(params: SamplingParams, *, vocabulary_size: int, context_length: int) -> tuple[Stage, ...]:
    """The stages in the order of llama.cpp's `common_sampler_init`; those that would change nothing are left out."""
    return tuple(_stages(params, vocabulary_size, context_length))


def _stages(params: SamplingParams, vocabulary_size: int, context_length: int) -> Iterator[Stage]:
    last_n = penalized_tokens(params, context_length)
    if last_n:
        penalties = (params.repeat_penalty, params.frequency_penalty, params.presence_penalty)
        yield Stage("penalties", (vocabulary_size, last_n, *penalties))
    if params.temperature <= 0:
        yield Stage("greedy", ())
        return
    if params.top_k > 0:
        yield Stage("top_k", (params.top_k,))
    if params.typical_p < 1:
        yield Stage("typical", (params.typical_p, 1))
    if params.top_p < 1:
        yield Stage("top_p", (params.top_p, 1))
    if params.min_p > 0:
        yield Stage("min_p", (params.min_p, 1))
    yield Stage("temp", (params.temperature,))
    yield Stage("dist", (params.seed & 0xFFFFFFFF if params.seed != -1 else secrets.randbits(31),))


def penalized_tokens(params: SamplingParams, context_length: int) -> int:
    """How many of the last tokens the penalties look at; 0 where no penalty is set."""
    if (params.repeat_penalty, params.frequency_penalty, params.presence_penalty) == (1.0, 0.0, 0.0):
        return 0
    return context_length if params.repeat_last_n < 0 else min(params.repeat_last_n, context_length)
