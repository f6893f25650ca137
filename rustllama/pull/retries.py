"""When a pull waits: how often and after which pauses it tries again what failed for a passing reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rustllama.errors import Unreachable

_LONGEST_S = 300.0  # that a server may make us wait


@dataclass(frozen=True, slots=True)
class Pauses:
    """In seconds. `rest_s` is asked after each piece that was fetched or hashed: see Pace."""

    asking: tuple[float, ...] = (0.5, 1.0, 2.0)
    fetching: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)
    rest_s: Callable[[], float] = lambda: 0.0


class Retries:
    """Of one thing. Its pauses grow until something comes of it, and are then as short as before."""

    def __init__(
        self,
        pauses_s: tuple[float, ...],
        pause: Callable[[float], object],
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`pause` waits for so many seconds; `tell` is told of it before."""
        self._pauses_s = pauses_s
        self._pause = pause
        self._tell = tell
        self._failures = 0

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, error: Unreachable) -> None:
        """Returns when it is time to try again. Raises `error` when that was done often enough."""
        if self._failures >= len(self._pauses_s) or (error.retry_after_s or 0) > _LONGEST_S:
            raise error
        pause_s = max(self._pauses_s[self._failures], float(error.retry_after_s or 0))
        self._failures += 1
        self._tell(f"trying again in {pause_s:g} s: {str(error).partition(': ')[0]}")
        self._pause(pause_s)
