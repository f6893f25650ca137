"""What a new prompt takes over: from a running sequence, from the states in memory or on disk, or from one that is just
being computed and is worth waiting for. Pure, in the hub.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rustllama.engine.batch import Clear, Copy, Inherit, Outcome, Restore
from rustllama.engine.prefix_store import Match
from rustllama.engine.sequence import Phase, Sequence
from rustllama.engine.shelf import Shelf
from rustllama.engine.states import WORTH_REUSING, Cuts, Stored, common_prefix, whole_chunks
from rustllama.engine.tally import Source

Slots = list[Sequence | None]


@dataclass(slots=True, eq=False)
class Fetch:
    """A state that the lane has to read from disk; a prompt waits for it."""

    stored: Stored
    goes_on: bool = True


@dataclass(frozen=True, slots=True)
class Wait:
    """Until `leader` has computed `count` tokens."""

    leader: Sequence
    count: int

    @property
    def goes_on(self) -> bool:
        return not self.leader.over and self.leader.computed < self.count


@dataclass(slots=True)
class Sharing:
    """Of one context; its `shelf` None: nothing is reused."""

    shelf: Shelf | None
    leaving: list[Sequence] = field(default_factory=list)  # whose state the current batch saves
    fetches: list[Fetch] = field(default_factory=list)  # of the last plan; the lane takes them out
    followers: dict[Sequence, Wait | Fetch] = field(default_factory=dict)  # they wait, and for what
    _restored: list[Restore] = field(default_factory=list)  # in the current batch

    def heir(self, ended: Sequence, waiting: Iterable[Sequence]) -> Sequence | None:
        """Who of those goes on from where this one ended, and can take over no more from memory."""
        if self.shelf is None or ended.dropped or ended.computed < WORTH_REUSING:
            return None
        held = ended.transcript[: ended.computed]
        for sequence in waiting:
            prompt = sequence.prompt[:-1]
            goes_on = sequence.opening == ended.opening and common_prefix(prompt, held) == len(held)
            if goes_on and not sequence.request.reproducible:
                match = self.shelf.of(sequence.request.owner).find(prompt, exact=False)
                return sequence if match is None or match.count <= len(held) else None
        return None

    def inherit(self, slot: int, ended: Sequence, heir: Sequence) -> Inherit:
        heir.computed = heir.cached = ended.computed
        heir.source = Source.RUNNING
        return Inherit(slot, ended, heir)

    def clear(self, slot: int, sequence: Sequence) -> Clear:
        """What becomes of a slot whose sequence has ended."""
        keep = self.shelf is not None and not sequence.dropped and self.shelf.wants(sequence.computed)
        if keep:
            self.leaving.append(sequence)
        return Clear(slot, sequence, keep)

    def settle(self, outcome: Outcome) -> None:
        """Stores what a step saved, and drops what it could not use."""
        self.leaving = []
        if self.shelf is not None:
            for restore in self._restored:
                if not restore.sequence.cached:
                    self.shelf.refuse(restore.match.saved)
            for kept in outcome.kept:
                self.shelf.of(kept.owner).put(kept.tokens, kept.held, kept.state, kept.exact)

    def border(self, leader: Sequence) -> int | None:
        """How far others wait for its prompt to be computed."""
        waits = (wait for wait in self.followers.values() if isinstance(wait, Wait) and wait.leader is leader)
        return min((wait.count for wait in waits if wait.goes_on), default=None)

    def plan(self, slots: Slots) -> Iterator[Copy | Restore]:
        """A prompt that nothing was computed of takes over the longest prefix there is, or waits for one."""
        before, self.followers, self._restored = self.followers, {}, []
        if self.shelf is None:
            return
        new = [(slot, s) for slot, s in enumerate(slots) if s is not None and _is_new(s)]
        leaders = self._leaders(slots) if new else {}
        for slot, sequence in new:
            waited = before.get(sequence)
            if waited is not None and waited.goes_on:
                self.followers[sequence] = waited
                continue
            found = self._find(self.shelf.of(sequence.request.owner), sequence, leaders[sequence.opening])
            if isinstance(found, Match):
                source = Source.DISK if isinstance(waited, Fetch) else Source.MEMORY
                yield self._restore(found, slot, sequence, source)
            elif isinstance(found, Wait) and not found.goes_on and found.leader not in self.leaving:
                source = Source.RUNNING if waited is None else Source.AWAITED
                yield self._copy(self.shelf.cuts, found, slots, slot, sequence, source)
            elif found is not None:
                self.followers[sequence] = found

    def _leaders(self, slots: Slots) -> dict[bytes, list[Sequence]]:
        """Who runs or leaves, by how the prompts begin: others have nothing to share."""
        found = defaultdict[bytes, list[Sequence]](list)
        for leader in (*(s for s in slots if s is not None and not s.over), *self.leaving):
            found[leader.opening].append(leader)
        return found

    def _find(self, shelf: Shelf, sequence: Sequence, leaders: list[Sequence]) -> Match | Wait | Fetch | None:
        """Where the longest prefix is; what is nearer wins among equals, but a match in memory needs nobody."""
        prompt, exact = sequence.prompt[:-1], sequence.request.reproducible
        match = shelf.find(prompt, exact=exact)
        wait = _best_leader(leaders, sequence, shelf.cuts, WORTH_REUSING if match is None else match.count + 1)
        best = wait or match
        if not exact:  # a file does not tell how its state was computed
            stored = shelf.find_on_disk(prompt, best.count if best is not None else 0)
            if stored is not None:
                self.fetches.append(Fetch(stored))
                return self.fetches[-1]
        return best

    def _restore(self, match: Match, slot: int, sequence: Sequence, source: Source) -> Restore:
        sequence.computed = sequence.cached = match.count
        sequence.source = source
        self._restored.append(Restore(slot, sequence, match))
        return self._restored[-1]

    def _copy(self, cuts: Cuts, found: Wait, slots: Slots, slot: int, sequence: Sequence, source: Source) -> Copy:
        sequence.computed = sequence.cached = found.count
        sequence.source = source
        keep = cuts != Cuts() and found.leader.computed == found.count
        return Copy(slots.index(found.leader), slot, found.leader, sequence, found.count, keep)


def _is_new(sequence: Sequence) -> bool:
    return sequence.phase is Phase.PREFILL and not sequence.computed and not sequence.over


def _best_leader(leaders: list[Sequence], sequence: Sequence, cuts: Cuts, at_least: int) -> Wait | None:
    """Who holds, or will hold, the longest prefix. Nobody waits for one that came later and has not begun."""
    best = None
    for leader in leaders:
        if leader is sequence or leader.dropped or (not leader.computed and leader.order >= sequence.order):
            continue
        shared = common_prefix(sequence.prompt[:-1], leader.transcript)
        if sequence.request.reproducible:
            shared = whole_chunks(min(shared, leader.exact))
        count = cuts.usable(max(leader.computed, shared), shared)
        if count >= at_least:
            best, at_least = Wait(leader, count), count + 1
    return best
