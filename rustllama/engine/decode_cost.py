"""What a decode call costs on this machine: learned from the calls themselves, asked for the shape of the next ones.

Pure arithmetic. The cost of a call is anything but linear in its rows: llama.cpp has kernels for one row, for few and
for many, and which of them is the cheapest per row differs by quantization and machine.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_WORTH_SPLITTING = 0.95  # of the plain call's cost: a gain below the noise of the measure is none
_SHALLOW = 256  # tokens; as many cells more are looked at whenever a sequence has become so much deeper (get_n_kv)
DRAFT_ROWS = 16  # of one sequence in a call, at most
_DRAFTS = (1, 3, 7, 15)  # that a sequence may carry: with its token, sizes that every kernel likes
_FEWEST_TO_CHOOSE = 2  # sizes of calls
_TRIES, _MOST_TRIES = 3, 8  # apart in time: a neighbour on the machine disturbs all that it meets
_AGREE = 1.05  # of the fastest try: so near has another one to come
_CORRECTION = 0.05  # upwards: what is slower may have been disturbed
_RELIEF = 0.5  # downwards: nothing makes a call faster than it is
_ENOUGH_TO_CHOOSE_AGAIN = 0.02
_FORGETTING = 0.9  # what the past weighs at each observation of what grows with depth: about ten of them count
_NOTICEABLE = 0.1  # of what a cell costs
_REMEMBERED = 1_000  # splits


class Split(NamedTuple):
    """How to advance some sequences by a token: `sizes` of them in each call, and `scratch` rows more in the last."""

    sizes: tuple[int, ...]
    scratch: int = 0


@dataclass(slots=True)
class DecodeCost:
    """`ms[rows]` is the time of a call with one row for each of so many sequences that hold little; 0: not known.

    Drafted rows cost the same, so that there may be more rows than slots. `cell_ms` is what each row adds for each cell
    that it looks at beyond the first ones: as many as the deepest sequence of its call has, whatever its own depth.
    """

    slots: int = 0
    ms: list[float] = field(default_factory=list)
    may_draft: bool = True
    complete: Callable[[list[float]], None] = lambda ms: None  # gets `ms` when all that is wanted was measured
    cell_ms: float = 0.0
    _tries: dict[int, list[float]] = field(default_factory=dict)  # what was measured, the fastest first
    _splits: dict[tuple[tuple[int, ...], int], Split] = field(default_factory=dict)
    _moved: float = 0.0  # share by which `ms` changed since the splits were chosen
    _seen_xy: float = 0.0  # sums of what tells `cell_ms`, by least squares
    _seen_xx: float = 0.0

    def __post_init__(self) -> None:
        most = max(self.slots, DRAFT_ROWS)
        self.ms = (self.ms + [0.0] * (most + 1))[: most + 1]
        self._tries = {rows: [ms] * (_TRIES - 1) if ms else [] for rows, ms in enumerate(self.ms)}

    @property
    def wanted(self) -> list[int]:
        """How many rows to measure, the next first: powers of two, as the cheapest calls are mostly made of them."""
        drafts = {1 + count for count in _DRAFTS} if self.may_draft else set()
        useful = drafts.union(range(1, self.slots + 1))
        if not self.slots or len(useful) < _FEWEST_TO_CHOOSE:
            return []
        unsure = [rows for rows in useful if not self._is_sure(rows)]
        return sorted(unsure, key=lambda rows: (len(self._tries[rows]), rows.bit_count(), rows))

    def measured(self, rows: int, ms: float) -> None:
        """Of a call on empty sequences."""
        self._try(rows, ms)
        if not self.wanted:
            self.complete(self.ms)

    def observe(self, rows: int, depth: float, ms: float) -> None:
        """A call that served somebody; `depth` is that of its deepest sequence, in tokens."""
        if rows >= len(self.ms):
            return
        if depth >= _SHALLOW:
            self._observe_deep(rows, depth, ms)
            return
        before = self.ms[rows]
        if not before:
            self._try(rows, ms)
            return
        self.ms[rows] = before + (_CORRECTION if ms > before else _RELIEF) * (ms - before)
        self._moved += abs(self.ms[rows] / before - 1)
        if self._moved > _ENOUGH_TO_CHOOSE_AGAIN:
            self._moved = 0.0
            self._splits.clear()

    def of_drafts(self, sequences: int, scratch: int = 0) -> tuple[tuple[int, float], ...]:
        """For each number of tokens that so many sequences may draft: the cost of their call, as a multiple of the one
        without drafts.
        """
        if not self.may_draft:
            return ()
        plain = self.ms[sequences + scratch] if sequences + scratch < len(self.ms) else 0
        sizes = [(count, sequences * (1 + count)) for count in _DRAFTS]
        known = [(count, rows) for count, rows in sizes if plain and rows < len(self.ms) and self.ms[rows]]
        return tuple((count, self.ms[rows] / plain) for count, rows in known)

    def of_a_row(self, rows: int, than: int) -> float | None:
        """What a row costs in a call of so many, as a multiple of what it does in one of `than`; None: not known."""
        if max(rows, than) >= len(self.ms) or not (self.ms[rows] and self.ms[than]):
            return None
        return self.ms[rows] / rows / (self.ms[than] / than)

    def split(self, depths: Sequence[int], scratch: int) -> Split:
        """The cheapest way to advance sequences of these depths in tokens, with at most so many scratch rows."""
        key = tuple(_further_cells(depth) for depth in depths), scratch
        if key not in self._splits:
            if len(self._splits) >= _REMEMBERED:
                self._splits.clear()
            self._splits[key] = self._cheapest(*key)
        return self._splits[key]

    def _observe_deep(self, rows: int, depth: float, ms: float) -> None:
        """What such a call takes longer than a shallow one, its cells took."""
        if not self.ms[rows]:
            return
        cells = rows * _further_cells(depth)
        self._seen_xy = _FORGETTING * self._seen_xy + cells * (ms - self.ms[rows])
        self._seen_xx = _FORGETTING * self._seen_xx + cells * cells
        found = max(0.0, self._seen_xy / self._seen_xx)
        if abs(found - self.cell_ms) > _NOTICEABLE * self.cell_ms:
            self.cell_ms = found
            self._splits.clear()

    def _try(self, rows: int, ms: float) -> None:
        """The fastest of several is the true one, the others were disturbed. One alone is not believed: what is taken
        for dear is never called again, and would never be corrected.
        """
        tries = self._tries[rows]
        insort(tries, ms)
        if self._agree(rows) or len(tries) >= _MOST_TRIES:
            self.ms[rows] = min(tries[0], self.ms[rows] or tries[0])
            self._splits.clear()

    def _is_sure(self, rows: int) -> bool:
        tries = len(self._tries[rows])
        return tries >= _MOST_TRIES or (tries >= _TRIES and self._agree(rows))

    def _agree(self, rows: int) -> bool:
        """Whether the two fastest tries do: two that were disturbed hardly ever took the same time."""
        tries = self._tries[rows]
        return len(tries) > 1 and tries[1] < _AGREE * tries[0]

    def _cheapest(self, cells: tuple[int, ...], scratch: int) -> Split:
        """Over all ways to cut the rows into calls of neighbours; only the last one's have empty slots beside them."""
        rows = len(cells)
        if not rows:
            return Split(())
        plain = Split((rows,))
        if not self.slots or not self.ms[rows]:
            return plain
        sizes = 1 + np.arange(rows) - np.arange(rows)[:, None]  # of the call from one row to another
        deepest = np.maximum.accumulate(np.triu(np.broadcast_to(cells, (rows, rows))), axis=1)
        calls = self._calls_ms(sizes, deepest)
        costs, starts = np.zeros(rows + 1), [0]  # of the first rows: what they take, and where their last call starts
        for end in range(1, rows):
            ways = costs[:end] + calls[:end, end - 1]
            starts.append(int(ways.argmin()))
            costs[end] = ways[starts[-1]]
        pads = np.arange(scratch + 1)
        ways = costs[:rows, None] + self._calls_ms(sizes[:, -1:] + pads, deepest[:, -1:])
        start, pad = divmod(int(ways.argmin()), len(pads))
        if ways[start, pad] >= _WORTH_SPLITTING * calls[0, -1]:
            return plain
        found = [rows - start]
        while start:
            found.append(start - starts[start])
            start = starts[start]
        return Split(tuple(reversed(found)), pad)

    def _calls_ms(self, rows: npt.NDArray[np.int_], cells: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
        """Of calls of so many rows that look at so many cells more; endless where that is not known or not possible."""
        known = np.array([ms or np.inf for ms in self.ms[: self.slots + 1]])
        found: npt.NDArray[np.float64] = known[np.where((rows > 0) & (rows <= self.slots), rows, 0)]
        return found + rows * cells * self.cell_ms


def _further_cells(depth: float) -> int:
    """How many cells more llama.cpp looks at than for a sequence that holds little."""
    return int(depth) // _SHALLOW * _SHALLOW
