"""How many bytes a second the memory gives to as many threads as would compute."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20}
_LEAST_BYTES, _MOST_BYTES = 128 << 20, 512 << 20
_SHARE = 8  # of free memory at most


def measure(threads: int, free_bytes: int, *, duration_s: float = 0.3) -> float:
    """The best of several readings of memory that no cache holds."""
    wanted = min(_MOST_BYTES, max(_LEAST_BYTES, 2 * _cache_bytes()), free_bytes // _SHARE)
    pieces = [np.ones(max(1, wanted // threads // 8)) for _ in range(threads)]
    best_s, end_s = float("inf"), time.perf_counter() + duration_s
    with ThreadPoolExecutor(threads) as pool:
        while True:
            started_s = time.perf_counter()
            list(pool.map(np.sum, pieces))
            now_s = time.perf_counter()
            best_s = min(best_s, now_s - started_s)
            if now_s >= end_s:
                return sum(piece.nbytes for piece in pieces) / best_s


def _cache_bytes() -> int:
    """Of the largest cache of a core; 0 where the system does not tell."""
    sizes = [_size(path) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=0)


def _size(path: Path) -> int:
    found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
    return int(found[1]) * _UNITS[found[2]] if found else 0
