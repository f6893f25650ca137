"""How much a pull computes: as much as it likes while there is room for it, and next to nothing while others compute.

That it gives way to others (`rlimits.give_way`) is not enough: what the kernel does for it, to copy and to get memory,
is not interrupted, and the threads of an answer wait for each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_ROOM = 0.5  # of a core, which others must leave
_SHARE = 0.03  # of a core, taken when they do not
_LONGEST_S = 0.5  # then it looks again


class Pace:
    """Asked after each piece of work, in any thread."""

    def __init__(
        self,
        free_cores: Callable[[], float],
        own_s: Callable[[], float] = time.process_time,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`own_s` is the CPU time of this process, `free_cores` how many cores others leave."""
        self._free_cores, self._own_s, self._now_s = free_cores, own_s, now_s
        self._lock = threading.Lock()
        self._began_own_s, self._began_s = own_s(), now_s()  # since when there is no room

    def rest_s(self) -> float:
        """How long to do nothing before the next piece."""
        with self._lock:
            own_s, now_s = self._own_s(), self._now_s()
            if self._free_cores() >= _ROOM:
                self._began_own_s, self._began_s = own_s, now_s
            over_s = (own_s - self._began_own_s) - _SHARE * (now_s - self._began_s)
            return min(max(0.0, over_s / _SHARE), _LONGEST_S)
