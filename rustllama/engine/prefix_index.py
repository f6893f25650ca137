"""Which of many token sequences a prompt begins with: found by bisection, as in a phone book."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from rustllama.engine.states import Cuts, Tokens, common_prefix


class Held(Protocol):
    """A state of the first `held` of these tokens, wherever it is."""

    @property
    def tokens(self) -> Tokens: ...

    @property
    def held(self) -> int: ...


T = TypeVar("T", bound=Held)


@dataclass(slots=True)
class PrefixIndex(Generic[T]):
    """The states of one shape, sorted by their tokens: those with the longest common prefixes are neighbours."""

    cuts: Cuts
    _sorted: list[T] = field(default_factory=list)
    _keys: list[bytes] = field(default_factory=list)  # their tokens; any order of bytes does, this one is fast

    def __iter__(self) -> Iterator[T]:
        return iter(self._sorted)

    def __contains__(self, stored: T) -> bool:
        return stored in self._sorted

    def add(self, stored: T) -> None:
        key = stored.tokens[: stored.held].tobytes()
        at = bisect_right(self._keys, key)
        self._keys.insert(at, key)
        self._sorted.insert(at, stored)

    def discard(self, stored: T) -> None:
        if stored in self._sorted:
            at = self._sorted.index(stored)
            del self._sorted[at], self._keys[at]

    def clear(self) -> None:
        self._sorted.clear()
        self._keys.clear()

    def longest(self, prompt: Tokens) -> tuple[T, int] | None:
        """What gives a prompt its longest prefix, and how many tokens that is. A short state that is cut within the
        window of sliding attention may be missed, where a longer one stands between.
        """
        at = bisect_right(self._keys, prompt.tobytes())
        best: tuple[T, int] | None = None
        for stored in [*self._sorted[max(0, at - 1) : at + 1], *self.prefixes(prompt)]:
            count = self.cuts.usable(stored.held, common_prefix(prompt, stored.tokens[: stored.held]))
            if count and (best is None or count > best[1]):
                best = stored, count
        return best

    def prefixes(self, tokens: Tokens) -> Iterator[T]:
        """Those that `tokens` begin with, the longest first."""
        at = bisect_right(self._keys, tokens.tobytes())
        while at:
            stored = self._sorted[at - 1]
            shared = common_prefix(tokens, stored.tokens[: stored.held])
            if shared == stored.held:
                yield stored
                at -= 1
            else:  # what shares more with `tokens` would be sorted behind it
                at = bisect_right(self._keys, tokens[:shared].tobytes(), 0, at - 1)

    def covers(self, tokens: Tokens) -> bool:
        """Whether the state after all of these tokens can be had."""
        found = self.longest(tokens)
        return found is not None and found[1] == len(tokens)

    def superfluous(self, new: T) -> list[T]:
        """Whose tokens can all be had from the new one."""
        shorter = self.prefixes(new.tokens[: new.held])
        return [stored for stored in shorter if self.cuts.usable(new.held, stored.held) == stored.held]
