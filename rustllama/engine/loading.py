"""How far the load of a model is."""

from __future__ import annotations

from collections.abc import Callable

from rustllama.core import Loading
from rustllama.engine.machine import mapped_bytes


class LoadGauge:
    """Bytes of a model's weights in memory.

    llama.cpp tells the share that it has read. Of a file that is mapped it tells nothing until the system has read it
    all (MAP_POPULATE), but there the process grows by what was read.
    """

    def __init__(self, total_bytes: int, mapped_bytes: Callable[[], int] = mapped_bytes) -> None:
        self._total_bytes = total_bytes
        self._mapped_bytes = mapped_bytes
        self._mapped_before: int | None = None  # the load
        self._mapped_most = 0
        self._share = 0.0

    def start(self) -> None:
        """Called in the hub, before the load."""
        self._mapped_before = self._mapped_bytes()

    def tell(self, share: float) -> None:
        """Called by the thread that loads."""
        self._share = share

    def read(self) -> Loading:
        """Called in the hub. Never tells less than before."""
        if self._mapped_before is not None:
            self._mapped_most = max(self._mapped_most, self._mapped_bytes() - self._mapped_before)
        completed = max(int(self._share * self._total_bytes), self._mapped_most)
        return Loading(min(completed, self._total_bytes), self._total_bytes)
