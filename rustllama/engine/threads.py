"""The threads of a context's calls: how many each gets, and whether it had the cores to itself."""

from __future__ import annotations

import time

from rustllama.engine.batch import Timing
from rustllama.engine.neighbours import Neighbours

_DISTURBED = 0.2  # of the CPU time that the threads could have had
_WAKING_NS = 1_000_000  # threads that slept are a bit late; one whose core is taken is away for longer


class Threads:
    """At most `most`, and no more than there are cores that the neighbours leave."""

    def __init__(self, most: int, neighbours: Neighbours, *, on_gpu: bool) -> None:
        self._most = most
        self._neighbours = neighbours
        self._on_gpu = on_gpu

    def watch(self, *, all_of_them: bool = False) -> Watch:
        """Of the call that begins now, on `n_threads` of them."""
        n_threads = self._most if all_of_them else self._neighbours.leave(self._most)
        return Watch(n_threads, n_threads < self._most, self._on_gpu)


class Watch:
    """How long a call takes from here on, and whether it had the cores to itself."""

    def __init__(self, n_threads: int, crowded: bool, on_gpu: bool) -> None:
        self.n_threads = n_threads
        self.crowded = crowded
        self._on_gpu = on_gpu
        self._cpu_ns = time.process_time_ns()
        self._started_ns = time.perf_counter_ns()

    def stop(self, rows: int, depth: float) -> Timing:
        """Threads that wait for each other spin: all of them compute all the time, unless their cores are taken."""
        took_ns = time.perf_counter_ns() - self._started_ns
        cpu_ns = time.process_time_ns() - self._cpu_ns
        missing_ns = self.n_threads * took_ns - cpu_ns
        disturbed = not self._on_gpu and missing_ns > max(_WAKING_NS, _DISTURBED * self.n_threads * took_ns)
        return Timing(rows, depth, took_ns, self.crowded or disturbed)
