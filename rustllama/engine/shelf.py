"""What one context can use of the states in memory and on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rustllama.engine.prefix_store import Match, PrefixStore
from rustllama.engine.states import WORTH_REUSING, Cuts, Saved, Shape, Stored, Tokens, as_tokens

WORTH_READING = 64  # tokens that a state on disk must add to what is in memory, and
_WORTH_READING_OF = 16  # it must add one of so many that are read: computing one takes longer than reading these


class Disk(Protocol):
    """Where states stay that leave memory. All methods are called in the hub."""

    def find(self, shape: Shape, prompt: Tokens) -> tuple[Stored, int] | None:
        """What gives the prompt its longest prefix, and how many tokens that is."""

    def fetch(self, stored: Stored) -> None:
        """Reads it into memory, where it then is, unless it could not be believed. The greenlet waits."""

    def take(self, new: Saved, left: list[Saved]) -> None:
        """A state came into memory, and these left it."""

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

    def of(self, owner: str) -> Shelf:
        """The part for the prompts of one owner."""
        return self if owner == self.shape.owner else replace(self, shape=self.shape._replace(owner=owner))

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
            new = Saved(self.shape, as_tokens(tokens), held, state, exact)
            left = self.store.put(new, self.cuts)
            if self.disk is not None:
                self.disk.take(new, left)

    def refuse(self, saved: Saved) -> None:
        """Drops a state that llama.cpp could not use."""
        self.store.discard(saved)
        if self.disk is not None:
            self.disk.refuse(saved)
