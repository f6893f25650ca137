"""Reuse by text: where a conversation goes on, what the model wrote is taken as the tokens that it wrote.

Tokenizing its text again may give others, and all that comes after them would have to be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from rustllama.engine.prefix_store import Tokens, as_tokens


class Recall:
    """Follows a prompt, span by span, along the known token sequences that begin like it."""

    def __init__(self, known: Iterable[Tokens], bytes_of: Callable[[int], bytes | None]) -> None:
        """`bytes_of` a token that text cannot spell, like a control token, is empty or None."""
        self._known = list(known)
        self._bytes_of = bytes_of
        self._length = 0

    def tokens(self, text: bytes, usual: list[int]) -> list[int]:
        """How a known sequence goes on with exactly this text; else the `usual` tokens."""
        if self._going_on_with(usual):
            return usual
        for known in self._known:
            end = self._end_of(text, known)
            if end is not None:
                return [int(token) for token in known[self._length : end]]
        return usual

    def follow(self, tokens: list[int]) -> None:
        """The prompt goes on with these."""
        self._known = self._going_on_with(tokens)
        self._length += len(tokens)

    def _going_on_with(self, tokens: list[int]) -> list[Tokens]:
        wanted, end = as_tokens(tokens), self._length + len(tokens)
        return [known for known in self._known if np.array_equal(known[self._length : end], wanted)]

    def _end_of(self, text: bytes, known: Tokens) -> int | None:
        """The place where the sequence has spelled the text, if a token ends there."""
        spelled = 0
        for place in range(self._length, len(known)):
            piece = self._bytes_of(int(known[place]))
            if not piece or not text.startswith(piece, spelled):
                return None
            spelled += len(piece)
            if spelled == len(text):
                return place + 1
        return None
