"""What a prompt call costs on this machine: learned from the calls themselves, asked for the size of the next ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from rustllama.engine.decode_cost import DecodeCost

_FORGETTING = 0.9  # what the past weighs at each observation: about ten of them count
_SPREAD = 64  # tokens of depth; over less, no slope can be told
_NEAR = 256  # tokens of depth
_FAR = 3  # times as far as the observations lie from their middle: beyond, a line through them is not to be trusted
_SMALLEST_CHUNK = 4  # tokens; kernels for several rows take so many at once
_SMALL_CALL = 8  # rows that cost as much as half of them on some machines, and twice as much on others
# Where a row costs so much of what it does in a smaller call, the larger one may take so many times the time there is
_STRETCHES = ((0.25, 1.75), (0.5, 1.5))
_CHEAPER = 0.9  # of a row in a smaller call: from here on a larger call pays
_ROUNDING = 1.1  # a call has as many rows as its kernel likes, and may take so much more than there is time for
_TOLERATED = 1.3  # times the time that there is: hardly a call may take longer
_WORST = 12  # times the mean delay: where others use the machine, hardly a call in a hundred has a longer one
_STEADINESS = 0.97  # what the delays of the past weigh at each observation
_MOST_BELIEVED = 3.0  # times what was expected; a machine that was paused or swapped tells nothing
_LEAST_ROOM = 0.7  # of the time that there is: however restless the machine, prompts go on
_DEARER = 1.15  # than in a smaller call no row is: what is taken for dear would never be tried again
_FIRST_CHUNK = 64  # tokens, before anything is known
FLASH_TILE = 64  # rows of one sequence, from which on llama.cpp's flash attention has another kernel (GGML_FA_TILE_Q)


@dataclass(slots=True)
class _Line:
    """y = a + b x by least squares, where the past fades."""

    weight: float = 0.0
    x: float = 0.0  # weighted sums from here on
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def observe(self, x: float, y: float) -> None:
        kept = _FORGETTING
        self.weight = kept * self.weight + 1
        self.x, self.y = kept * self.x + x, kept * self.y + y
        self.xx, self.xy = kept * self.xx + x * x, kept * self.xy + x * y

    def reaches(self, x: float) -> bool:
        """Whether it tells anything about there."""
        spread = math.sqrt(max(0.0, self._variation) / self.weight)
        return abs(x - self.x / self.weight) < max(_NEAR, _FAR * spread)

    @property
    def slope(self) -> float | None:
        """None where the observations lie too close together."""
        if self._variation < _SPREAD * _SPREAD:
            return None
        return max(0.0, (self.xy - self.x * self.y / self.weight) / self._variation)

    @property
    def _variation(self) -> float:
        """The weighted sum of squares."""
        return self.xx - self.x * self.x / self.weight

    def at(self, x: float, slope: float) -> float:
        """Through the middle of what was observed; never less than a quarter of that."""
        mean = self.y / self.weight
        return max(mean / 4, mean + slope * (x - self.x / self.weight))


@dataclass(slots=True)
class _Delays:
    """What calls took beyond what was expected of them, as shares of that; the past fades."""

    total: float = 0.0
    calls: float = 5.0  # of so many; the first ones are taken for granted

    def observe(self, share: float) -> None:
        self.total = _STEADINESS * self.total + max(0.0, share)
        self.calls = _STEADINESS * self.calls + 1

    @property
    def room(self) -> float:
        """Of the time that there is, what a call may be expected to take: less where others use the machine, so that
        calls which they disturb take little longer than there is.
        """
        return min(1.0, max(_LEAST_ROOM, _TOLERATED / (1 + _WORST * self.total / self.calls)))


@dataclass(slots=True)
class PromptCost:
    """Milliseconds per row of a prompt call, by its size (powers of two) and by the depth of its rows.

    From `tile` rows of one sequence on, attention has another kernel; 1 where all calls have the same. Small calls have
    the kernels of decode calls, which were measured while nothing disturbed them: they tell what a size takes beside
    another one.
    """

    tile: int = FLASH_TILE
    decode_cost: DecodeCost = field(default_factory=DecodeCost)
    _lines: dict[int, _Line] = field(default_factory=dict)
    _delays: _Delays = field(default_factory=_Delays)

    def observe(self, rows: int, depth: float, ms: float) -> None:
        """A call of so many prompt tokens; `depth` is how many cells each of them saw, in the mean."""
        line, expected_ms = self._lines.get(rows.bit_length()), rows * self.ms_per_row(rows, depth)
        if line and line.reaches(depth) and expected_ms:  # what is guessed from other calls tells of no delay
            ms = min(ms, _MOST_BELIEVED * expected_ms)
            self._delays.observe(ms / expected_ms - 1)
        self._learn(rows, depth, ms)
        other = {_SMALLEST_CHUNK: _SMALL_CALL, _SMALL_CALL: _SMALLEST_CHUNK}.get(rows)
        ratio = self.decode_cost.of_a_row(other, rows) if other else None
        if other and ratio:
            self._learn(other, depth, ratio * ms / rows * other)

    def _learn(self, rows: int, depth: float, ms: float) -> None:
        if rows > _SMALLEST_CHUNK:  # those that are left over take about as long as so many
            rows = min(-(-rows // _SMALLEST_CHUNK) * _SMALLEST_CHUNK, (1 << rows.bit_length()) - 1)
        self._lines.setdefault(rows.bit_length(), _Line()).observe(depth, ms / rows)

    def ms_per_row(self, rows: int, depth: float) -> float:
        """0 while nothing is known."""
        if not self._lines:
            return 0.0
        nearest = self._nearest(rows.bit_length(), depth)
        return self._lines[nearest].at(depth, self._slope(nearest, depth))

    def rows_within(self, ms: float, depth: float, most: int, left_ms: float = 0.0) -> int:
        """The largest call that takes no longer, in steps of _SMALLEST_CHUNK, at most `most`. `left_ms`: what calls
        before it left of their time.

        Where less than a call of another kernel would fit, that one may take longer if its rows are much cheaper.
        """
        if not self._lines:
            return min(_FIRST_CHUNK, most)
        best = max(self._fitting(self._delays.room * ms + left_ms, depth, most), default=_SMALLEST_CHUNK)
        best -= best % _SMALLEST_CHUNK
        for larger in (_SMALL_CALL, self.tile):
            if best < larger <= most and self._is_worth(larger, best, depth, ms, left_ms):
                best = larger
        return min(best, most) // _SMALLEST_CHUNK * _SMALLEST_CHUNK or most

    def left_ms(self, ms: float, rows: int, depth: float, left_ms: float) -> float:
        """What a call of so many rows that begins at this depth leaves of what it may take, and of what was left to it:
        calls come in steps of rows.
        """
        return max(0.0, self._delays.room * ms + left_ms - rows * self._per_row(rows, depth))

    def _is_worth(self, larger: int, smaller: int, depth: float, ms: float, left_ms: float) -> bool:
        """Whether the larger call may take longer than there is time for."""
        small, large = self._per_row(smaller, depth), self._per_row(larger, depth)
        limit_ms = max(ms, smaller * small)
        longer = max((times for cheap, times in _STRETCHES if large <= cheap * small), default=1.0)
        may_take_ms = max(longer * limit_ms, _ROUNDING * (limit_ms + left_ms))
        return large <= _CHEAPER * small and larger * large <= may_take_ms

    def _fitting(self, ms: float, depth: float, most: int) -> Iterator[int]:
        """The largest call of each size that takes no longer. Deep in a prompt, less than a tile begins with a small
        call: what is known of other depths and of tiles says little about it.
        """
        small = (line for size, line in self._lines.items() if not self._is_tiled(size))
        tried = self.tile == 1 or depth < _NEAR or any(line.reaches(depth) for line in small)
        if not tried:
            yield _SMALL_CALL
        least = float("inf")
        for bits in range(_SMALLEST_CHUNK.bit_length(), most.bit_length() + 1):
            if not (tried or self._is_tiled(bits)):
                continue
            smallest, largest = 1 << (bits - 1), (1 << bits) - 1
            per_row = min(self._per_row(smallest, depth), _DEARER * least)
            least = min(least, per_row)
            rows = min(int(ms / per_row), largest)
            if rows >= smallest:
                yield rows

    def _per_row(self, rows: int, depth: float) -> float:
        """Of a call that begins at this depth."""
        return self.ms_per_row(rows, depth + rows / 2)

    def _nearest(self, size: int, depth: float) -> int:
        """Of the sizes that were seen: of the same kernel, at about this depth, of about as many rows."""

        def distance(seen: int) -> tuple[bool, bool, int, int]:
            other_kernel = self._is_tiled(seen) != self._is_tiled(size)
            return other_kernel, not self._lines[seen].reaches(depth), abs(seen - size), seen

        return min(self._lines, key=distance)

    def _slope(self, size: int, depth: float) -> float:
        """Of what was seen at many depths, about this one too: that size, else the next one of its kernel, else of the
        other.
        """
        own = self._lines[size].slope
        if own is not None and self._lines[size].reaches(depth):  # mostly; every waiting prompt asks in each step
            return own
        known = {seen: line.slope for seen, line in self._lines.items() if line.slope is not None}

        def distance(seen: int) -> tuple[bool, bool, int]:
            other_kernel = self._is_tiled(seen) != self._is_tiled(size)
            return other_kernel, not self._lines[seen].reaches(depth), abs(seen - size)

        nearest = min(known, key=distance, default=None)
        return 0.0 if nearest is None else known[nearest]

    def _is_tiled(self, size: int) -> bool:
        """Whether all calls of this size (bits of their rows) have the kernel for tiles."""
        return size >= self.tile.bit_length()
