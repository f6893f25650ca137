"""Computed prompts in host memory: what a finished conversation left, for the next prompt that begins like it.

Pure: a state is bytes that only llama.cpp understands. The store outlives the models, so an unload forgets nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from rustllama.engine.prefix_index import PrefixIndex
from rustllama.engine.states import WORTH_REUSING, Cuts, Saved, Shape, Tokens


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
    _indexes: dict[Shape, PrefixIndex[Saved]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Saved]:
        """The one used last comes first."""
        return reversed(self._saved.values())

    def find(self, shape: Shape, cuts: Cuts, prompt: Tokens, *, exact: bool = False) -> Match | None:
        """The longest usable prefix, compared token by token; `exact`: see `Saved.shared_exactly`."""
        index = self._index(shape, cuts)
        found = self._longest_exact(index, prompt) if exact else index.longest(prompt)
        if found is None or found[1] < WORTH_REUSING:
            return None
        self._saved.move_to_end(id(found[0]))
        return Match(*found)

    def put(self, saved: Saved, cuts: Cuts) -> list[Saved]:
        """Keeps it, and lets go of those that it makes superfluous: their tokens can be had from it.

        Returns those that left for lack of room.
        """
        index = self._index(saved.shape, cuts)
        for other in index.superfluous(saved):
            if saved.exact >= other.exact:
                self._drop(other)
        self._saved[id(saved)] = saved
        index.add(saved)
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
        assert {id(saved) for index in self._indexes.values() for saved in index} == set(self._saved)
        assert all(WORTH_REUSING <= saved.held <= len(saved.tokens) for saved in self._saved.values())

    def _index(self, shape: Shape, cuts: Cuts) -> PrefixIndex[Saved]:
        return self._indexes.setdefault(shape, PrefixIndex(cuts))

    def _longest_exact(self, index: PrefixIndex[Saved], prompt: Tokens) -> tuple[Saved, int] | None:
        usable = ((saved, index.cuts.usable(saved.held, saved.shared_exactly(prompt))) for saved in index)
        return max(usable, key=lambda found: found[1], default=None)

    def _drop(self, saved: Saved) -> None:
        self._indexes[saved.shape].discard(saved)
        del self._saved[id(saved)]
        self.used_bytes -= len(saved.state)
