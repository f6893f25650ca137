"""What other programs compute on the cores that this one may use, and how many threads that leaves for a call.

The threads of a call wait for each other hundreds of times. One whose core is taken by somebody else keeps them all
waiting: a call on fewer threads, each with a core to itself, is faster, and so is the other program.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rustllama.engine.machine import Cores, cores, yielding_children_s

_PERIOD_S = 0.2  # shorter, and the kernel's hundredths of a second tell too little
_RECENT_S = 2  # after a longer rest, who computed meanwhile may have ended, and only who does so now counts


class Neighbours:
    """Where the system tells nothing, there are none."""

    def __init__(
        self,
        look: Callable[[], Cores | None] = cores,
        own_s: Callable[[], float] = time.process_time,
        yielding_s: Callable[[], float] = yielding_children_s,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`own_s` is the CPU time of this process, `yielding_s` what `look` counts of others and is no reason to leave
        cores: it falls when one of them ends.
        """
        self._look, self._own_s, self._yielding_s, self._now_s = look, own_s, yielding_s, now_s
        self._seen = look()
        self._own_then_s, self._yielding_then_s, self._then_s = own_s(), yielding_s(), now_s()
        self.busy = 0.0

    def leave(self, most: int) -> int:
        """Threads for the next call: at most so many, and no more than there are cores left."""
        return max(1, round(min(most, self.free())))

    def free(self) -> float:
        """Cores that others do not compute on; infinity where the system tells nothing."""
        now_s = self._now_s()
        if now_s - self._then_s >= _PERIOD_S:
            self._count(now_s)
        return math.inf if self._seen is None else self._seen.count - self.busy

    def _count(self, now_s: float) -> None:
        before, own_before_s, yielding_before_s = self._seen, self._own_then_s, self._yielding_then_s
        self._seen, self._own_then_s, self._yielding_then_s = self._look(), self._own_s(), self._yielding_s()
        if self._seen is not None and before is not None:
            yielding_s = max(0.0, self._yielding_then_s - yielding_before_s)
            others_s = self._seen.busy_s - before.busy_s - (self._own_then_s - own_before_s) - yielding_s
            self.busy = max(0.0, others_s / (now_s - self._then_s))
            if now_s - self._then_s > _RECENT_S:
                self.busy = min(self.busy, max(0, self._seen.running - 1))
        self._then_s = now_s
