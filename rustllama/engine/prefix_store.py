"""Computed prompts in host memory: what a finished conversation left, for the next prompt that begins like it.

Pure: a state is bytes that only llama.cpp understands. The store outlives the models, so an unload forgets nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rustllama.core import ModelInfo

Tokens = npt.NDArray[np.int32]

EXACT_CHUNK = 32  # tokens; who wants the same bits computes a prompt alone, in calls of this size
WORTH_REUSING = 16  # tokens; fewer are computed sooner than a state is copied
WORTH_READING = 64  # tokens that a state on disk must add to what is in memory, and
_WORTH_READING_OF = 16  # it must add one of so many that are read: computing one takes longer than reading these


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
    """What shapes a state besides its tokens: one is never read into a context of another shape."""

    digest: str
    n_ctx: int
    n_slots: int
    flash_attention: str
    kv_cache_type: str


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

    def shared(self, prompt: Tokens, *, exact: bool) -> int:
        """How many of the prompt's first tokens it holds; `exact` ones only, where that matters."""
        common = common_prefix(prompt, self.tokens[: self.exact if exact else self.held])
        return whole_chunks(common) if exact else common


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A state on disk; all is known of it but its bytes."""

    shape: Shape
    tokens: Tokens
    held: int
    name: str  # of its file
    size_bytes: int  # of its file


@dataclass(frozen=True, slots=True)
class Match:
    """The first `count` tokens of a prompt can come from `saved`."""

    saved: Saved
    count: int


@dataclass(frozen=True, slots=True)
class StoreState:
    """What `/metrics` tells of a store."""

    place: str
    limit_bytes: int
    used_bytes: int
    states: int
    tokens: int
    evicted: int  # states that left for others, since the start


@dataclass(slots=True)
class PrefixStore:
    """All saved states of all models; the ones used longest ago leave when they take more than `limit_bytes`."""

    limit_bytes: int
    used_bytes: int = 0
    evicted: int = 0
    _saved: OrderedDict[int, Saved] = field(default_factory=OrderedDict)  # by identity, used last at the end

    def __iter__(self) -> Iterator[Saved]:
        """The one used last comes first."""
        return reversed(self._saved.values())

    def find(self, shape: Shape, cuts: Cuts, prompt: Tokens, *, exact: bool = False) -> Match | None:
        """The longest usable prefix, compared token by token."""
        best: Match | None = None
        for saved in self:
            if saved.shape == shape:
                count = cuts.usable(saved.held, saved.shared(prompt, exact=exact))
                if count >= WORTH_REUSING and (best is None or count > best.count):
                    best = Match(saved, count)
        if best is not None:
            self._saved.move_to_end(id(best.saved))
        return best

    def put(self, saved: Saved, cuts: Cuts) -> list[Saved]:
        """Keeps it, and lets go of those that it makes superfluous: their tokens can be had from it.

        Returns those that left for lack of room.
        """
        for other in [other for other in self._saved.values() if _covers(saved, other, cuts)]:
            self._drop(other)
        self._saved[id(saved)] = saved
        self.used_bytes += len(saved.state)
        left = []
        while self.used_bytes > self.limit_bytes:
            left.append(next(iter(self._saved.values())))
            self._drop(left[-1])
            self.evicted += 1
        return left

    def holds(self, saved: Saved) -> bool:
        return self._saved.get(id(saved)) is saved

    def discard(self, saved: Saved) -> None:
        if self.holds(saved):
            self._drop(saved)

    def forget(self, digest: str) -> None:
        """Drops what was saved of this model."""
        for saved in [saved for saved in self._saved.values() if saved.shape.digest == digest]:
            self._drop(saved)

    def state(self) -> StoreState:
        tokens = sum(saved.held for saved in self)
        return StoreState("memory", self.limit_bytes, self.used_bytes, len(self._saved), tokens, self.evicted)

    def check_integrity(self) -> None:
        """Every stored byte is accounted for."""
        assert self.used_bytes == sum(len(saved.state) for saved in self._saved.values()) <= self.limit_bytes
        assert all(WORTH_REUSING <= saved.held <= len(saved.tokens) for saved in self._saved.values())

    def _drop(self, saved: Saved) -> None:
        del self._saved[id(saved)]
        self.used_bytes -= len(saved.state)


def _covers(new: Saved, old: Saved, cuts: Cuts) -> bool:
    if new.shape != old.shape or common_prefix(new.tokens[: new.held], old.tokens[: old.held]) < old.held:
        return False
    return cuts.usable(new.held, old.held) == old.held and new.exact >= old.exact


class Disk(Protocol):
    """Where states stay that leave memory. All methods are called in the hub."""

    def find(self, shape: Shape, prompt: Tokens) -> tuple[Stored, int] | None:
        """What gives the prompt its longest prefix, and how many tokens that is."""

    def fetch(self, stored: Stored) -> None:
        """Reads it into memory, where it then is, unless it could not be believed. The greenlet waits."""

    def take(self, left: list[Saved]) -> None:
        """Something came into memory, and these left it."""

    def refuse(self, saved: Saved) -> None:
        """llama.cpp could not use this state, wherever it came from."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """The part of a store, and of a disk, that one context can use."""

    store: PrefixStore
    shape: Shape
    cuts: Cuts
    token_bytes: int  # of a state, per token
    disk: Disk | None = None

    def find(self, prompt: Tokens, *, exact: bool) -> Match | None:
        return self.store.find(self.shape, self.cuts, prompt, exact=exact)

    def find_on_disk(self, prompt: Tokens, known: int) -> Stored | None:
        """What is worth its reading where the first `known` tokens can be had without."""
        found = self.disk.find(self.shape, prompt) if self.disk is not None else None
        if found is None or found[0].size_bytes > self.store.limit_bytes:
            return None
        stored, count = found
        return stored if count - known >= max(WORTH_READING, stored.held // _WORTH_READING_OF) else None

    def wants(self, held: int) -> bool:
        """Whether a state of so many tokens is worth its bytes."""
        return held >= WORTH_REUSING and held * self.token_bytes <= self.store.limit_bytes

    def put(self, tokens: Sequence[int], held: int, state: memoryview, exact: int) -> None:
        if len(state) <= self.store.limit_bytes:
            left = self.store.put(Saved(self.shape, as_tokens(tokens), held, state, exact), self.cuts)
            if self.disk is not None:
                self.disk.take(left)

    def refuse(self, saved: Saved) -> None:
        """Drops a state that llama.cpp could not use."""
        self.store.discard(saved)
        if self.disk is not None:
            self.disk.refuse(saved)
