"""The hyperparameters of a header, by name without the architecture and of the type that llama.cpp wants."""

from __future__ import annotations

from typing import TypeVar

from rustllama.errors import BadModelFile
from rustllama.gguf.header import Header, Value

T = TypeVar("T", str, int, float)

_GLOBAL = ("general.", "tokenizer.")


class Keys:
    """Getters take what stands for an absent key. They raise BadModelFile for one of another type."""

    def __init__(self, header: Header) -> None:
        self.path, self.values = header.path, header.values
        self.architecture = self.text("general.architecture", "")

    def bad(self, why: str) -> BadModelFile:
        return BadModelFile(f"{self.path} cannot be served: {why}; it is damaged or badly converted.")

    def get(self, key: str) -> Value | None:
        return self.values.get(key if key.startswith(_GLOBAL) else f"{self.architecture}.{key}")

    def text(self, key: str, default: str) -> str:
        return self._typed(key, default, str)

    def number(self, key: str, default: int) -> int:
        return self._typed(key, default, int)

    def real(self, key: str, default: float) -> float:
        return self._typed(key, default, float)

    def _typed(self, key: str, default: T, kind: type[T]) -> T:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.bad(f"{key} is {str(value)[:40]!r}, which is of the wrong type")
        return value

    def per_block(self, key: str, default: int) -> list[int]:
        """A number for each block, from one for all or from an array."""
        count, value = self.number("block_count", 0), self.get(key)
        if not isinstance(value, list):
            return [self.number(key, default)] * count
        if len(value) != count or not all(isinstance(element, int) for element in value):
            raise self.bad(f"{key} has {len(value)} elements for {count} blocks")
        return [int(element) for element in value]

    def tokens(self) -> list[str]:
        value = self.get("tokenizer.ggml.tokens")
        return [str(token) for token in value] if isinstance(value, list) else []

    def token(self, key: str) -> str:
        """The text of the token that `key` gives the id of, or nothing."""
        tokens, number = self.tokens(), self.number(key, -1)
        return tokens[number] if 0 <= number < len(tokens) else ""


def printable(token: str) -> str:
    """A token's text without the lone surrogates that stand for bytes."""
    return token.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
