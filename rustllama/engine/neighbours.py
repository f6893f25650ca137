"""What other programs compute on the cores that this one may use, and how many threads that leaves for a call.

The threads of a call wait for each other hundreds of times. One whose core is taken by somebody else keeps them all
waiting: a call on fewer threads, each with a core to itself, is faster, and so is the other program.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rustllama.engine.machine import Cores, cores

_PERIOD_S = 1.0  # the kernel counts in hundredths of a second


class Neighbours:
    """Looks once a second; where the system tells nothing, there are none."""

    def __init__(
        self,
        look: Callable[[], Cores | None] = cores,
        own_s: Callable[[], float] = time.process_time,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`own_s` is the CPU time of this process."""
        self._look, self._own_s, self._now_s = look, own_s, now_s
        self._seen = look()
        self._own_then_s, self._then_s = own_s(), now_s()
        self.busy = 0.0

    def leave(self, most: int) -> int:
        """Threads for the next call: at most so many, and no more than there are cores left."""
        now_s = self._now_s()
        if now_s - self._then_s >= _PERIOD_S:
            self._count(now_s)
        free = most if self._seen is None else round(self._seen.count - self.busy)
        return max(1, min(most, free))

    def _count(self, now_s: float) -> None:
        before, own_before_s, passed_s = self._seen, self._own_then_s, now_s - self._then_s
        self._seen, self._own_then_s, self._then_s = self._look(), self._own_s(), now_s
        if self._seen is not None and before is not None:
            others_s = self._seen.busy_s - before.busy_s - (self._own_then_s - own_before_s)
            self.busy = max(0.0, others_s / passed_s)
