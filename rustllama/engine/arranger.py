"""Carries out what a step changes in the slots: states are saved, cleared, moved, copied and restored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from rustllama.engine.batch import Arrangement, Clear, Copy, Inherit, Kept, Move, Restore, Swap
from rustllama.engine.native import Context
from rustllama.engine.sequence import Sequence

_log = logging.getLogger("rustllama.engine")


class Arranger:
    """Of one context; belongs to the native thread."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def carry_out(self, changes: Iterable[Arrangement]) -> Iterator[Kept]:
        """Yields the states that are to be kept."""
        copied: tuple[Sequence, memoryview] | None = None
        for change in changes:
            match change:
                case Clear(slot, sequence, keep):
                    if keep:
                        yield _kept(sequence, sequence.tokens, sequence.computed, self._context.save(slot))
                    self._context.clear(slot)
                case Inherit():
                    pass  # the slot stays as it is
                case Move(source, target):
                    self._context.move(source, target)
                case Swap(one, other):
                    self._context.swap(one, other)
                case Copy(source, target, leader, sequence, count, keep):
                    if copied is None or copied[0] is not leader:
                        copied = leader, self._context.save(source)
                        if keep:
                            yield _kept(leader, leader.tokens[:count], count, copied[1])
                    self._restore(target, sequence, copied[1], count)
                case Restore(target, sequence, found):
                    self._restore(target, sequence, found.saved.state, found.count)

    def _restore(self, slot: int, sequence: Sequence, state: memoryview, count: int) -> None:
        """Where llama.cpp does not end up with exactly those tokens, they are computed after all."""
        if not self._context.restore(slot, state, count):
            _log.warning("a saved state of %d tokens could not be used", count)
            self._context.clear(slot)
            sequence.computed = sequence.cached = 0
            sequence.order = 0  # others may wait for it, so it waits for nobody who has not begun


def _kept(sequence: Sequence, tokens: list[int], held: int, state: memoryview) -> Kept:
    return Kept(tuple(tokens), held, state, min(sequence.exact, held), sequence.request.owner)
