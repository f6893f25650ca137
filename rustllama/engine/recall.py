"""Reuse by text: where a conversation goes on, what the model wrote is taken as the tokens that it wrote.

Tokenizing its text again may give others, and all that comes after them would have to be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from rustllama.engine.states import Tokens, as_tokens


class Recall:
    """Follows one prompt along the known token sequences that begin like it."""

    def __init__(self, known: Iterable[Tokens], bytes_of: Callable[[int], bytes | None]) -> None:
        """`bytes_of` a token that text cannot spell, like a control token, is empty or None."""
        self._known = list(known)
        self._bytes_of = bytes_of
        self._prompt: list[int] = []

    def rewrite(self, tokens: list[int]) -> list[int]:
        """The prompt with each text between two control tokens as it was written, where exactly that is known."""
        read = 0
        for is_text, group in groupby(tokens, key=lambda token: bool(self._bytes_of(token))):
            if not self._known:
                break
            run = list(group)
            read += len(run)
            self._follow(self._as_written(run) if is_text else run)
        return self._prompt + tokens[read:]

    def _as_written(self, run: list[int]) -> list[int]:
        if self._going_on_with(run):
            return run
        text = b"".join(self._bytes_of(token) or b"" for token in run)
        for known in self._known:
            end = self._end_of(text, known)
            if end is not None:
                return [int(token) for token in known[len(self._prompt) : end]]
        return run

    def _follow(self, tokens: list[int]) -> None:
        self._known = self._going_on_with(tokens)
        self._prompt += tokens

    def _going_on_with(self, tokens: list[int]) -> list[Tokens]:
        start, wanted = len(self._prompt), as_tokens(tokens).tobytes()
        return [known for known in self._known if known[start : start + len(tokens)].tobytes() == wanted]

    def _end_of(self, text: bytes, known: Tokens) -> int | None:
        """The place where the sequence has spelled the text, if a token ends there."""
        spelled = 0
        for place in range(len(self._prompt), len(known)):
            piece = self._bytes_of(int(known[place]))
            if not piece or not text.startswith(piece, spelled):
                return None
            spelled += len(piece)
            if spelled == len(text):
                return place + 1
        return None
