"""Turns the bytes of tokens into text: whole characters only, and never a piece of a stop string."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field


def _utf8() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


@dataclass(slots=True)
class Detokenizer:
    """One answer's text. `stop` strings are not part of it; `stopped` says that one was met."""

    stop: tuple[str, ...] = ()
    stopped: bool = False
    _held: str = ""  # text that may turn out to begin a stop string
    _decoder: codecs.IncrementalDecoder = field(default_factory=_utf8)

    def push(self, piece: bytes) -> str:
        """The text that has become certain with this token."""
        text = self._decoder.decode(piece)
        if not self.stop or not text:
            return text
        return self._release(self._held + text)

    def flush(self) -> str:
        """What was held back, at the end of the answer; an unfinished character becomes U+FFFD."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return "" if self.stopped else text

    def _release(self, text: str) -> str:
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        safe = len(text) - max(_overlap(text, stop) for stop in self.stop)
        self._held = text[safe:]
        return text[:safe]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
