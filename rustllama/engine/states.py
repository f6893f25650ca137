"""Saved states: of which tokens, of which shape, and where they may be cut. What a state is, only llama.cpp knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rustllama.core import ModelInfo

Tokens = npt.NDArray[np.int32]

EXACT_CHUNK = 32  # tokens; who wants the same bits computes a prompt alone, in calls of this size
WORTH_REUSING = 16  # tokens; fewer are computed sooner than a state is copied


def as_tokens(tokens: Sequence[int]) -> Tokens:
    return np.array(tokens, np.int32)


def common_prefix(one: Tokens, other: Tokens) -> int:
    """How many leading tokens are the same."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def whole_chunks(tokens: int) -> int:
    return tokens // EXACT_CHUNK * EXACT_CHUNK


class Shape(NamedTuple):
    """What a state is besides its tokens: one is never read into a context of another shape, nor for another owner."""

    digest: str
    n_ctx: int
    n_slots: int
    flash_attention: str
    kv_cache_type: str
    owner: str = ""  # whose prompts; others never get it


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a state may be cut. llama.cpp does as told and is then wrong without a word (llama_memory_seq_rm)."""

    window: int = 0  # of sliding attention, tokens; 0: full attention
    recurrent: bool = False

    @classmethod
    def of(cls, info: ModelInfo) -> Cuts:
        return cls(info.sliding_window, info.recurrent_state_bytes > 0)

    def usable(self, held: int, shared: int) -> int:
        """Tokens that remain of a state of `held` tokens when `shared` of them are wanted: `shared`, or 0.

        The sliding layers of a state hold what its next token can see, which is less than a window of tokens.
        """
        whole = shared >= held
        return shared if whole or (not self.recurrent and (not self.window or held < self.window)) else 0


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """The state after the first `held` tokens; further ones were sampled and not computed.

    The first `exact` were computed in calls of EXACT_CHUNK.
    """

    shape: Shape
    tokens: Tokens
    held: int
    state: memoryview
    exact: int = 0

    def shared_exactly(self, prompt: Tokens) -> int:
        """How many of the prompt's first tokens it holds, of those that were computed in calls of EXACT_CHUNK."""
        return whole_chunks(common_prefix(prompt, self.tokens[: self.exact]))


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A state on disk; all is known of it but its bytes."""

    shape: Shape
    tokens: Tokens
    held: int
    name: str  # of its file
    size_bytes: int  # of its file
