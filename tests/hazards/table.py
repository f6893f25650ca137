"""What each row of the table has measured, and whether that passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.hazards import WHOLE


@dataclass(slots=True)
class Row:
    """One test's. `check` raises for what has not passed, when all of it is known."""

    id: str  # pytest's
    name: str
    figures: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def is_at_most(self, what: str, value: float, limit: float, unit: str = "") -> None:
        self._note(f"{what} {_number(value)}{unit} (at most {_number(limit)})", value <= limit)

    def is_at_least(self, what: str, value: float, limit: float, unit: str = "") -> None:
        self._note(f"{what} {_number(value)}{unit} (at least {_number(limit)})", value >= limit)

    def is_within(self, what: str, value: float, limit: float, unit: str = " ms") -> None:
        """As `is_at_most`, of a time or of memory: it is only told, not judged, in the quick form."""
        self._note(f"{what} {_number(value)}{unit} (at most {_number(limit)})", value <= limit or not WHOLE)

    def check(self) -> None:
        assert not self.missed, "; ".join(self.missed)

    def _note(self, figure: str, passed: bool) -> None:
        self.figures.append(figure)
        if not passed:
            self.missed.append(figure)


def lines(rows: Sequence[Row], outcomes: Mapping[str, str]) -> list[str]:
    """The table, in Markdown. `outcomes` are those of the tests, by their ids."""
    body = [(row.name, ", ".join(row.figures), outcomes.get(row.id, "not run")) for row in rows]
    return ["| row | figure | pass |", "|---|---|---|", *(f"| {' | '.join(cells)} |" for cells in body)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed; none at all: infinity."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.inf


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"
