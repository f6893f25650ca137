"""Drafts of what a sequence will say next, taken from what it has said: answers quote their prompts.

Prompt lookup decoding (Saxena, 2023): what followed the last tokens before may follow again. A draft is
computed together with the token that is certain, and kept as far as the sampler draws the same: no answer changes
(speculative decoding, Leviathan et al., 2023). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_GRAM = 3  # tokens that must have come before
_LEARNING_RATE = 0.3
_WORTH_DRAFTING = 1.1  # times the tokens per second without


@dataclass(slots=True)
class Drafter:
    """Follows the tokens of one sequence, a list that its owner extends. Its drafts are judged whether they were
    computed or not: a sequence that quotes nothing never pays for one.
    """

    tokens: list[int]
    trust: float = 0.0  # share of the drafted tokens that came true lately
    _next: int | None = None  # the place where what comes next was said before
    _places: dict[tuple[int, ...], int] = field(default_factory=dict)  # by the tokens before a place

    def __post_init__(self) -> None:
        for place in range(_GRAM, len(self.tokens)):
            self._places[tuple(self.tokens[place - _GRAM : place])] = place
        self._look_up()

    def follow(self) -> None:
        """The sequence has a token more."""
        if self._next is not None:
            came_true = self.tokens[self._next] == self.tokens[-1]
            self.trust += _LEARNING_RATE * (came_true - self.trust)
            self._next = self._next + 1 if came_true else None
        self._look_up()

    def draft(self, count: int) -> list[int]:
        """So many tokens that may come next, or none; beyond the last token, a draft goes on from itself."""
        if self._next is None:
            return []
        said = self.tokens[self._next : self._next + count]
        period = len(said)
        return [said[i % period] for i in range(count)]

    def _look_up(self) -> None:
        gram = tuple(self.tokens[-_GRAM:])
        if self._next is None:
            self._next = self._places.get(gram)
        self._places[gram] = len(self.tokens)


def expected(trust: float, count: int) -> float:
    """How many of so many drafted tokens come true, where each does so with this probability if those before it did."""
    return count if trust >= 1 else trust * (1 - trust**count) / (1 - trust)


def worthwhile(trust: float, costs: tuple[tuple[int, float], ...]) -> int:
    """How many tokens to draft, of the choices in `costs`: each with the cost of the call that computes them, as a
    multiple of the one without. 0 where none pays.
    """
    gains = [((1 + expected(trust, count)) / cost, count) for count, cost in costs]
    gain, count = max(gains, default=(0.0, 0))
    return count if gain > _WORTH_DRAFTING else 0
