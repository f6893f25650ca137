"""One answer as its reader saw it: what every mode of the bench measures, and what the figures are made of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Trace:
    """Times are seconds of one monotonic clock; `arrivals` says when tokens came and how many came together."""

    started_s: float
    arrivals: tuple[tuple[float, int], ...] = ()
    prompt_tokens: int | None = None  # as the server counted them
    answer_tokens: int | None = None  # likewise; None: only the arrivals are known
    server_ms: Mapping[str, float] = field(default_factory=dict)  # durations that the server itself gave
    left: bool = False  # the reader hung up in the middle, as it was told to
    error: str | None = None

    @property
    def tokens(self) -> int:
        seen = sum(count for _, count in self.arrivals)
        return seen if self.answer_tokens is None else self.answer_tokens

    @property
    def finished(self) -> bool:
        return self.error is None and not self.left and bool(self.arrivals)

    @property
    def first_s(self) -> float:
        """When the first token came; only of an answer that has arrivals."""
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        return self.arrivals[-1][0]

    def gaps_s(self, after_s: float = 0.0, until_s: float = float("inf")) -> list[float]:
        """Waits between tokens that ended within the given times."""
        times = [when for when, _ in self.arrivals]
        return [later - sooner for sooner, later in itertools.pairwise(times) if after_s <= later and sooner <= until_s]

    def rate_between(self, from_s: float, until_s: float) -> float | None:
        """Tokens a second from the first arrival within these times to the last one, whole gaps alone: the tokens of a
        step come a bit apart, and some of them after `until_s`. None where less than a gap lies within.

        Tokens without text of their own are spread over the arrivals.
        """
        within = [(when, count) for when, count in self.arrivals if from_s <= when <= until_s]
        if not within or within[0][0] == within[-1][0]:
            return None
        seen = sum(count for _, count in self.arrivals)
        return self.tokens * sum(count for _, count in within[1:]) / seen / (within[-1][0] - within[0][0])
