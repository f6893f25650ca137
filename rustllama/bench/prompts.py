"""Prompts of a wanted number of tokens, no two alike, for a model whose vocabulary and template are unknown."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rustllama.errors import BadRequest

# A letter behind a space costs the same number of tokens wherever it stands, in most vocabularies one.
_LETTERS = "abcdefghijkl"
_PROBES = (32, 96)  # words


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Counts are tokens, the chat template's own included. All `words` cost the same."""

    words: Sequence[str]
    tokens_per_word: float
    template_tokens: float
    seed: int

    @classmethod
    def calibrate(cls, count_tokens: Callable[[str], int], seed: int) -> PromptMaker:
        """`count_tokens` asks the server how many tokens a prompt has. Raises BadRequest where that makes no sense."""
        few, many = _PROBES
        costs = {letter: count_tokens(" ".join(letter * few)) for letter in _LETTERS}
        [(usual, _)] = Counter(costs.values()).most_common(1)
        words = [letter for letter, cost in costs.items() if cost == usual]
        tokens_per_word = (count_tokens(_text(words, many, f"{seed} probe")) - usual) / (many - few)
        if tokens_per_word <= 0:
            raise BadRequest("The server's token counts do not grow with the prompt, so none can be made to measure.")
        return cls(words, tokens_per_word, usual - few * tokens_per_word, seed)

    def make(self, number: int, tokens: int, shared_prefix: int = 0) -> str:
        """The prompt of request `number`: its first `shared_prefix` tokens are those of every other one.

        Raises BadRequest where the chat template alone is longer.
        """
        count = round((tokens - self.template_tokens) / self.tokens_per_word)
        shared = min(count, round(shared_prefix / self.tokens_per_word))
        if count < 1:
            least = round(self.template_tokens + self.tokens_per_word)
            raise BadRequest(f"A prompt of this model has at least {least} tokens; ask for more.")
        own = _text(self.words, count - shared, f"{self.seed} {number}")
        return " ".join(filter(None, (_text(self.words, shared, f"{self.seed} shared"), own)))


def _text(words: Sequence[str], count: int, seed: str) -> str:
    return " ".join(random.Random(seed).choices(words, k=count))
