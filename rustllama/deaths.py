"""The deaths of workers: what the log says of one, who is to blame, and when the next worker starts."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from rustllama.engine.black_box import Call, Evidence, Mark

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_BOOT_ERRORS = (3, 4)  # Gunicorn's exit statuses of a worker in which Python failed: it would fail again
_MOST_ROUNDS = 4  # of workers that never served, before the server gives up
_FIRST_DELAY_S = 0.5  # after the second round; it doubles
_LONGEST_ROUND = 8  # 32 s


@dataclass(frozen=True, slots=True)
class Death:
    """`code` as `os.waitstatus_to_exitcode` gives it; `impatience`: the master ended it, as it gave no sign of life."""

    pid: int
    code: int
    evidence: Evidence
    impatience: bool = False

    @property
    def cause(self) -> str:
        return _name(-self.code) if self.code < 0 else f"exit status {self.code}"

    @property
    def guilty(self) -> tuple[Mark, ...]:
        """The models against which it counts: none where it was killed from outside, or for memory."""
        return self.evidence.suspects if -self.code in _CRASHES and not self.impatience else ()

    def __str__(self) -> str:
        """One line for the log."""
        if self.impatience:
            return f"worker {self.pid} gave no sign of life and was ended"
        hint = " (somebody killed it, or memory was short)" if self.code == -signal.SIGKILL else ""
        words = f": {self.evidence.words}" if self.evidence.words else ""
        return f"worker {self.pid} died of {self.cause}{hint}{self._where}{words}"

    @property
    def _where(self) -> str:
        call = self.evidence.call
        places = [_of_call(call)] if call is not None else []
        places += [_of_mark(mark) for mark in self.evidence.suspects if call is None or mark.model != call.model]
        if places:
            return " " + " and ".join(places)
        return " while no model computed" if self.evidence.ready else " before it served"


def _of_call(call: Call) -> str:
    requests = "request" if len(call.requests) == 1 else "requests"
    whom = f"while computing for {requests} {', '.join(call.requests)}"
    return f'in model "{call.model}" {whom if call.requests else "after its requests"}'


def _of_mark(mark: Mark) -> str:
    return f'while model "{mark.model}" ' + ("waited for its first token" if mark.loaded else "was loading")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return f"signal {number}"


@dataclass(slots=True)
class Restarts:
    """The next worker starts at once, but later and later where they die before they serve.

    A server of which no worker ever served gives up: whoever started it should see that. One that has served does not.
    """

    workers: int
    clock: Callable[[], float] = time.monotonic
    served: bool = False
    failures: int = 0  # in a row
    not_before_s: float = 0.0

    def ended(self, code: int, *, ready: bool, others_serve: bool = False) -> None:
        self.served = self.served or ready or others_serve
        if ready or not code:
            self.failures = 0
            return
        boot_error = code in _BOOT_ERRORS and not self.served
        self.failures = self.workers * _MOST_ROUNDS if boot_error else self.failures + 1
        rounds = self.failures // self.workers
        delay_s = _FIRST_DELAY_S * 2 ** (min(rounds, _LONGEST_ROUND) - 2) if rounds > 1 else 0.0
        self.not_before_s = self.clock() + delay_s

    @property
    def allowed(self) -> bool:
        return self.clock() >= self.not_before_s

    @property
    def hopeless(self) -> bool:
        return not self.served and self.failures >= self.workers * _MOST_ROUNDS
