"""Computed prompts on disk: what the folder has, and when what is in memory goes there.

A state is written when it has rested for a while, when it leaves memory, when its model is unloaded and when the server
ends. Not sooner: each turn of a conversation replaces the state of the turn before, and they are hundreds of megabytes;
what a killed server loses are the last seconds, which are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator

from rustllama import bridge
from rustllama.engine.prefix_index import PrefixIndex
from rustllama.engine.prefix_store import PrefixStore, StoreState
from rustllama.engine.shelf import WORTH_READING
from rustllama.engine.state_folder import StateFolder
from rustllama.engine.states import Cuts, Saved, Shape, Stored, Tokens

_REST_S = 15.0  # a state is written once it has been in memory between one and two of these
_PATIENCE_S = 2.0  # that a load waits for the index, which goes on without it
_HEADS_AT_ONCE = 64  # that are read before they can be found
_LEAVING_BYTES = 128 * 1024**2  # of states that left memory and wait for the disk; when there are more, they are lost
_LEAVING_OF = 8  # and one of so many bytes of what memory may keep: nobody counts them there any more


class DiskStore:
    """See `prefix_store.Disk`. Files are read in a worker thread, one after another, and written in the background."""

    def __init__(self, folder: StateFolder, memory: PrefixStore, rest_s: float = _REST_S) -> None:
        self._folder = folder
        self._memory = memory
        self._rest_s = rest_s
        self._indexes: dict[Shape, PrefixIndex[Stored]] = {}
        self._leaving: dict[int, Saved] = {}  # by identity: they left memory and are not yet written
        self._most_leaving_bytes = min(_LEAVING_BYTES, memory.limit_bytes // _LEAVING_OF)
        self._new: set[int] = set()  # identities: they came into memory since the timer rang
        self._resting: set[int] = set()  # likewise, before it rang; they are written when it rings again
        self._evicted = 0
        self._timer: bridge.Timer | None = None
        self._reading = bridge.RLock()
        self._writing = bridge.RLock()

    def open(self, shape: Shape, cuts: Cuts) -> None:
        """Learns what the folder has for contexts of this shape."""
        if shape in self._indexes:
            return
        if not self._indexes:
            bridge.spawn(lambda: bridge.background(self._folder.tidy))
        index = self._indexes[shape] = PrefixIndex(cuts)
        complete = bridge.Event()
        bridge.spawn(lambda: self._learn(shape, index, complete))
        complete.wait(_PATIENCE_S)

    def known(self, digest: str, owner: str) -> Iterator[Tokens]:
        """The tokens of all that is on disk of a model, for this owner."""
        for shape, index in self._indexes.items():
            if shape.digest == digest and shape.owner == owner:
                yield from (stored.tokens for stored in index)

    def find(self, shape: Shape, prompt: Tokens) -> tuple[Stored, int] | None:
        return self._index(shape).longest(prompt)

    def fetch(self, stored: Stored) -> None:
        index = self._index(stored.shape)
        with self._reading:
            state = bridge.offload(self._folder.read, stored) if stored in index else None
            if state is None:
                index.discard(stored)
            elif stored in index:  # nobody forgot it meanwhile
                saved = Saved(stored.shape, stored.tokens, stored.held, state)
                self._see_off(self._memory.put(saved, index.cuts))

    def take(self, new: Saved, left: list[Saved]) -> None:
        self._new.add(id(new))
        self._set_timer()
        self._see_off(left)

    def refuse(self, saved: Saved) -> None:
        index = self._index(saved.shape)
        same = [stored for stored in index.prefixes(saved.tokens[: saved.held]) if stored.held == saved.held]
        for stored in same:
            index.discard(stored)
        bridge.spawn(lambda: bridge.background(self._folder.delete, [stored.name for stored in same]))

    def flush(self, digest: str | None = None) -> None:
        """Writes what is only in memory, of a model or of all; returns when that is done."""
        unwritten = self._of(self._new | self._resting)
        self._write_all({id(saved) for saved in unwritten if digest in (None, saved.shape.digest)})

    def forget(self, digest: str) -> None:
        """Returns when nothing of the model is on disk; called when nothing of it is in memory."""
        for saved in [saved for saved in self._leaving.values() if saved.shape.digest == digest]:
            del self._leaving[id(saved)]
        self._clear(digest)  # or what is being read would come into memory
        with self._writing:
            self._clear(digest)  # of what was being written
            bridge.background(self._folder.forget, digest)

    def state(self) -> StoreState:
        """Of the models that were loaded since the start."""
        known = [stored for index in self._indexes.values() for stored in index]
        used_bytes, tokens = sum(stored.size_bytes for stored in known), sum(stored.held for stored in known)
        return StoreState("disk", self._folder.limit_bytes, used_bytes, len(known), tokens, self._evicted)

    def check_integrity(self) -> None:
        """Every byte in the folder is accounted for; called while no other process uses it."""
        with self._writing:
            for shape, index in self._indexes.items():
                recorded = {stored.name: stored.size_bytes for stored in index}
                assert bridge.offload(self._folder.sizes, shape) == recorded
                assert bridge.offload(lambda: self._folder.used_bytes) <= self._folder.limit_bytes

    def _index(self, shape: Shape) -> PrefixIndex[Stored]:
        """What there is of one owner among many is learnt at the first need, for which it comes too late."""
        if shape not in self._indexes:
            index = self._indexes[shape] = PrefixIndex(self._indexes[shape._replace(owner="")].cuts)
            bridge.spawn(lambda: self._learn(shape, index, bridge.Event()))
        return self._indexes[shape]

    def _clear(self, digest: str) -> None:
        for shape, index in self._indexes.items():
            if shape.digest == digest:
                index.clear()

    def _learn(self, shape: Shape, index: PrefixIndex[Stored], complete: bridge.Event) -> None:
        names = bridge.offload(self._folder.names, shape)
        for first in range(0, len(names), _HEADS_AT_ONCE):
            for stored in bridge.offload(self._folder.heads, shape, names[first : first + _HEADS_AT_ONCE]):
                index.add(stored)
        complete.set()

    def _lacks(self, saved: Saved) -> bool:
        """Whether the disk should have it, and has not."""
        if saved.held < WORTH_READING or len(saved.state) > self._folder.limit_bytes:
            return False
        return not self._index(saved.shape).covers(saved.tokens[: saved.held])

    def _set_timer(self) -> None:
        if self._timer is None:
            self._timer = bridge.Timer(self._rest_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._resting = self._write_all(self._resting) | {id(saved) for saved in self._of(self._new)}
        self._new.clear()
        if self._resting:
            self._set_timer()

    def _of(self, identities: set[int]) -> list[Saved]:
        """Those of these that are still in memory; the one used last comes first."""
        return [saved for saved in self._memory if id(saved) in identities]

    def _write_all(self, identities: set[int]) -> set[int]:
        """Of what is in memory, the one used last at the end: what is written first leaves the disk first. Returns what
        is left when the disk takes no more.
        """
        while saved := next(iter(self._of(identities)[::-1]), None):
            if not self._write(saved):
                break
            identities = identities - {id(saved)}
        return {id(saved) for saved in self._of(identities)}

    def _see_off(self, left: list[Saved]) -> None:
        """They have left memory: they are written at once, or lost where the disk is too slow for what comes."""
        idle = not self._leaving
        for saved in left:
            waiting_bytes = sum(len(other.state) for other in self._leaving.values())
            fits = not waiting_bytes or waiting_bytes + len(saved.state) <= self._most_leaving_bytes
            if fits and self._lacks(saved):
                self._leaving[id(saved)] = saved
        if idle and self._leaving:
            bridge.spawn(self._write_leaving)

    def _write_leaving(self) -> None:
        """In the order in which they left."""
        while saved := next(iter(self._leaving.values()), None):
            self._write(saved)
            self._leaving.pop(id(saved), None)

    def _write(self, saved: Saved) -> bool:
        """False when the disk did not take it. What was dropped while it waited for its turn is not written."""
        with self._writing:
            if not (self._memory.holds(saved) or id(saved) in self._leaving) or not self._lacks(saved):
                return True
            stored, left = bridge.background(self._folder.write, saved)
            self._discard(left)
            self._evicted += len(left)
            if stored is None:
                return False
            index = self._index(saved.shape)
            superfluous = [other.name for other in index.superfluous(stored)]
            index.add(stored)
            self._discard(superfluous)
            bridge.background(self._folder.delete, superfluous)
            return True

    def _discard(self, names: list[str]) -> None:
        """Takes files out of the indexes that are not there any more."""
        for index in self._indexes.values() if names else ():
            for stored in [stored for stored in index if stored.name in names]:
                index.discard(stored)
