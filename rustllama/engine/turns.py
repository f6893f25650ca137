"""Whose turn it is on the native thread: equal shares of its time for the models that are busy at once.

Pure: times come from the caller. Start-time fair queueing (Goyal, Vin and Cheng, 1996), where a turn is as many steps
as make up for one long step of another model: a step cannot be interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

SHORTEST_TURN_NS = 10_000_000  # handing over costs a way through the hub, and what the caches hold


@dataclass(slots=True, eq=False)
class Share:
    """One model's part of the time, which its lanes divide among them."""

    turns: Turns
    used_ns: int = 0
    busy: int = 0  # lanes that have the turn or wait for it


@dataclass(slots=True, eq=False)
class Claim:
    """One lane's: `granted` is called when its turn begins."""

    share: Share
    granted: Callable[[], None]
    had_ns: float = 0  # the time that it has had, counted once for each lane it divided the share with


@dataclass(slots=True)
class Turns:
    """Whoever has had the least of those who wait is next. All methods are called in the hub, but `over`."""

    holder: Claim | None = None
    waiting: list[Claim] = field(default_factory=list)
    _began_ns: int = 0
    _charged_ns: int = 0  # the time until which the holder's turn is on its account
    _present_ns: float = 0  # where those who are busy stand, so that idle ones save nothing up
    _ends_ns: float = math.inf

    def ask(self, claim: Claim, now_ns: int) -> None:
        """Who asks calls `leave`, whether its turn came or not."""
        self._charge(now_ns)
        claim.had_ns = max(claim.had_ns, self._present_ns)
        claim.share.busy += 1
        self.waiting.append(claim)
        self._pass_on(now_ns)

    def leave(self, claim: Claim, now_ns: int) -> None:
        """Ends the turn, or the wait for it."""
        self._charge(now_ns)
        claim.share.busy -= 1
        if claim is self.holder:
            self.holder = None
        else:
            self.waiting.remove(claim)
        self._pass_on(now_ns)

    def over(self, now_ns: int) -> bool:
        """Whether the turn should end, as others wait; may be called in any thread."""
        return now_ns >= self._ends_ns

    def _charge(self, now_ns: int) -> None:
        if self.holder is not None:
            spent_ns = now_ns - self._charged_ns
            self.holder.share.used_ns += spent_ns
            self.holder.had_ns += spent_ns * self.holder.share.busy
            self._present_ns = min(claim.had_ns for claim in (self.holder, *self.waiting))
        self._charged_ns = now_ns

    def _pass_on(self, now_ns: int) -> None:
        if self.holder is None and self.waiting:
            self.holder = min(self.waiting, key=lambda claim: claim.had_ns)
            self.waiting.remove(self.holder)
            self._began_ns = now_ns
            self.holder.granted()
        self._ends_ns = self._end_ns(now_ns)

    def _end_ns(self, now_ns: int) -> float:
        """When the holder will have had as much as the next one, but no shorter than a turn should be."""
        if self.holder is None or not self.waiting:
            return math.inf
        ahead_ns = min(claim.had_ns for claim in self.waiting) - self.holder.had_ns
        return max(self._began_ns + SHORTEST_TURN_NS, now_ns + ahead_ns / self.holder.share.busy)
