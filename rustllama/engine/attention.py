"""Which of llama.cpp's two ways to attend is the faster one here: flash attention, or plain products of matrices.

It depends on the model's heads and on the processor: of one and the same machine, plain attention took a fifth of the
time in heads of 64 channels, as the vectors of its processor are longer than that, and 1.3 times as long in heads of
128. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rustllama.core import ModelInfo

_ROUNDS = 5  # in turns, so that a disturbance meets both ways; the fastest counts
_MOST_CHANNELS = 1 << 17  # of the queries: no model has more, but a header may say so
_CLEARLY = 0.8  # of the time with flash attention, which takes less memory


class Heads(NamedTuple):
    """Of a layer; lengths in channels."""

    queries: int
    keys: int
    key_length: int
    value_length: int

    @classmethod
    def of(cls, info: ModelInfo) -> Heads | None:
        """None where the model does not attend, or in a way of its own."""
        keys = max(info.head_count_kv, default=0)
        heads = cls(info.head_count, keys, info.key_length, info.value_length)
        usual = all(heads) and heads.queries % keys == 0 and max(heads) * heads.queries < _MOST_CHANNELS
        return heads if usual else None


class Call(NamedTuple):
    """So many rows in each of some streams that hold `depth` tokens."""

    rows: int
    depth: int
    streams: int


_PROMPT, _DECODE = Call(128, 512, 1), Call(1, 512, 4)
_PROMPT_TOKENS, _ANSWER_TOKENS = 512, 128  # of a turn of a chat, the new ones


def is_open(flash_attention: str, gpu_layers: int) -> bool:
    """Whether this setting leaves the choice to us: on a GPU, "auto" is llama.cpp's own."""
    return flash_attention == "auto" and not gpu_layers


def prefers_plain(attention_ms: Callable[[Call, bool], float]) -> bool:
    """Whether a turn of a chat spends clearly less time on attention without flash attention.

    `attention_ms` measures a call, with or without it.
    """
    fastest: dict[tuple[Call, bool], float] = {}
    for _ in range(_ROUNDS):
        for call in (_PROMPT, _DECODE):
            for flash in (True, False):
                fastest[call, flash] = min(attention_ms(call, flash), fastest.get((call, flash), float("inf")))
    return _turn_ms(fastest, flash=False) < _CLEARLY * _turn_ms(fastest, flash=True)


def _turn_ms(call_ms: dict[tuple[Call, bool], float], *, flash: bool) -> float:
    prompt = _PROMPT_TOKENS / (_PROMPT.rows * _PROMPT.streams) * call_ms[_PROMPT, flash]
    return prompt + _ANSWER_TOKENS / (_DECODE.rows * _DECODE.streams) * call_ms[_DECODE, flash]
