"""Decides each step: which sequences hold which slots, what they take over from others, which of them decode, and which
prompt tokens are computed.

Pure Python in the hub: no llama.cpp, no threads, no clock. `plan()` is the policy, the runner carries it out.
Continuous batching after Orca (Yu et al., 2022), stall-free prefill after Sarathi-Serve (Agrawal et al., 2024).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from rustllama.engine.batch import Arrangement, Batch, Call, Chunk, Clear, Inherit, Move, Outcome, Swap
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.prompt_cost import PromptCost
from rustllama.engine.sequence import Phase, Sequence
from rustllama.engine.sharing import Sharing
from rustllama.engine.states import EXACT_CHUNK
from rustllama.errors import Busy, Cancelled, RustllamaError

_NS_PER_MS = 1_000_000
_ALONE_MS = 1_000  # what one prompt call may take when nobody waits for its next token
_MOST_LEFT = 0.4  # of what the prompts of a step may take: so much may the next ones take more
_LEARNING_RATE = 0.3
_NOBODY = 3  # comes behind all ranks


@dataclass(slots=True)
class Scheduler:
    """The slots and the queue of one context. All methods are called in the hub, between two steps or during one."""

    n_slots: int
    n_batch: int
    max_queue: int
    gap_ms: float
    sharing: Sharing = field(default_factory=lambda: Sharing(shelf=None))
    queue: deque[Sequence] = field(default_factory=deque)
    slots: list[Sequence | None] = field(default_factory=list)
    decode_ms: float = 0.0  # of a step's decode calls together
    decode_cost: DecodeCost = field(default_factory=DecodeCost)
    prompt_cost: PromptCost = field(default_factory=PromptCost)
    _left_ms: float = 0.0  # of what the last step's prompts might have taken
    _admitted: int = 0

    def __post_init__(self) -> None:
        self.slots = [None] * self.n_slots

    def check_room(self) -> None:
        """Raises Busy where the queue is full. A sequence that finds a free slot does not count as waiting."""
        if len(self.queue) >= self.max_queue + self._free:
            raise Busy("server busy, please try again. maximum pending requests exceeded")

    def add(self, sequence: Sequence) -> None:
        """Raises Busy."""
        self.check_room()
        self.queue.append(sequence)

    def cancel(self, sequence: Sequence, reason: RustllamaError | None = None) -> None:
        """Ends a sequence in any phase; its reader gets the reason. A slot is cleared by the next plan."""
        if sequence.over:
            return
        if sequence.phase is Phase.QUEUED:
            self.queue.remove(sequence)
        sequence.cancelled = True
        sequence.outlet.put(reason or Cancelled())

    def expire(self, sequence: Sequence, now_ns: int) -> None:
        """Ends a sequence whose time is up with what it has; one that decodes, with its next token."""
        if sequence.over:
            return
        if sequence.phase is Phase.QUEUED:
            self.queue.remove(sequence)
        answer = sequence.expire(now_ns)
        if answer is not None:
            sequence.outlet.put(answer)

    def lose_all(self, reason: RustllamaError) -> None:
        """Ends who has a slot, as llama.cpp's memory was emptied; the queue goes on."""
        self.sharing.leaving = []
        for sequence in self.slots:
            if sequence is not None:
                sequence.computed = 0
                self.cancel(sequence, reason)

    def end_all(self, reason: RustllamaError) -> None:
        for sequence in [*self.queue, *self.running]:
            self.cancel(sequence, reason)

    @property
    def running(self) -> list[Sequence]:
        return [sequence for sequence in self.slots if sequence is not None and not sequence.over]

    @property
    def can_admit(self) -> bool:
        return bool(self.queue) and self._free > 0

    @property
    def must_clear(self) -> bool:
        return any(sequence is not None and sequence.over for sequence in self.slots)

    @property
    def only_ended(self) -> bool:
        """Whether nothing is left to do but to save what ended."""
        return self.sharing.shelf is not None and self.must_clear and not self.queue and not self.running

    def position(self, sequence: Sequence) -> int:
        """Its place among those for whom no slot is free, 1 the first; 0 has one, or gets it in the next plan."""
        return max(0, self.queue.index(sequence) + 1 - self._free) if sequence in self.queue else 0

    @property
    def ended(self) -> list[Sequence]:
        """Sequences that are over and not yet on the shelf."""
        return [*self.sharing.leaving, *(sequence for sequence in self.slots if sequence is not None and sequence.over)]

    @property
    def _free(self) -> int:
        return self.n_slots - len(self.running)

    def plan(self, now_ns: int, *, others_wait: bool = False) -> Batch | None:
        """The next step, or None when there is nothing to do. `others_wait`: streams of another model, perhaps."""
        arrange: tuple[Arrangement, ...] = (*self._clear(now_ns), *self._close_ranks())
        self._admit(now_ns)
        arrange += tuple(self.sharing.plan(self.slots))
        decode = tuple(self._calls())
        prompt = tuple(self._chunks(self._target_ms(bool(decode), others_wait), now_ns))
        return Batch(arrange, decode, prompt, bool(self.sharing.followers)) if arrange or decode or prompt else None

    def apply(self, outcome: Outcome) -> None:
        """Learns what a step costs, and stores what it saved."""
        self.sharing.settle(outcome)
        if outcome.decode:
            self.decode_ms = _learn(self.decode_ms, sum(call.ms for call in outcome.decode))
        for call in outcome.decode:
            if not call.crowded:
                self.decode_cost.observe(call.rows, call.depth, call.ms)
        if outcome.prompt is not None:
            self.prompt_cost.observe(outcome.prompt.rows, outcome.prompt.depth, outcome.prompt.ms)

    def _clear(self, now_ns: int) -> Iterator[Clear | Inherit]:
        """Who has ended leaves, and where a request that is next goes on from there, its state stays for that one."""
        for slot, sequence in enumerate(self.slots):
            if sequence is not None and sequence.over:
                self.slots[slot] = None
                heir = self.sharing.heir(sequence, itertools.islice(self.queue, self._free))
                if heir is None:
                    yield self.sharing.clear(slot, sequence)
                else:
                    self.queue.remove(heir)
                    self._begin(slot, heir, now_ns)
                    yield self.sharing.inherit(slot, sequence, heir)

    def _close_ranks(self) -> Iterator[Move | Swap]:
        """Sequences that decode together get the lowest slots, those that decode alone come next, prompts follow:
        llama.cpp batches only neighbours.
        """
        ranks = [_NOBODY if sequence is None else _rank(sequence) for sequence in self.slots]
        for rank in range(_NOBODY):
            low, high = 0, self.n_slots - 1
            while True:
                low = next((i for i in range(low, self.n_slots) if ranks[i] > rank), self.n_slots)
                high = next((i for i in range(high, -1, -1) if ranks[i] <= rank), -1)
                if low > high:
                    break
                yield Move(high, low) if self._is_empty(low) else Swap(low, high)
                self.slots[low], self.slots[high] = self.slots[high], self.slots[low]
                ranks[low], ranks[high] = ranks[high], ranks[low]

    def _is_empty(self, slot: int) -> bool:
        sequence = self.slots[slot]
        return sequence is None or not sequence.computed

    def _admit(self, now_ns: int) -> None:
        for slot, holder in enumerate(self.slots):
            if holder is None and self.queue:
                self._begin(slot, self.queue.popleft(), now_ns)

    def _begin(self, slot: int, sequence: Sequence, now_ns: int) -> None:
        self.slots[slot] = sequence
        sequence.phase, sequence.admitted_ns = Phase.PREFILL, now_ns
        sequence.tally.queue.observe(now_ns - sequence.arrived_ns)
        sequence.order = self._admitted = self._admitted + 1

    def _calls(self) -> Iterator[Call]:
        """The decode calls of a step, in the cheapest shape; who wants the same bits always has a call alone."""
        decoding = tuple(s for s in self.slots if s is not None and s.phase is Phase.DECODE)
        together = sum(not sequence.request.reproducible for sequence in decoding)
        scratch = self._empty_from(together) if together == len(decoding) else 0
        split = self.decode_cost.split([sequence.computed for sequence in decoding[:together]], scratch)
        start = 0
        for size in (*split.sizes, *[1] * (len(decoding) - together)):
            end = start + size
            spare = split.scratch if end == together else 0
            yield Call(start, decoding[start:end], spare, self.decode_cost.of_drafts(size, spare))
            start = end

    def _empty_from(self, slot: int) -> int:
        held = (i for i, sequence in enumerate(self.slots[slot:]) if sequence is not None)
        return next(held, self.n_slots - slot)

    def _target_ms(self, decodes: bool, others_wait: bool) -> float:
        """What the prompts of a step may take: where streams decode, the rest of the gap between two tokens."""
        if decodes:
            return max(self.gap_ms, 2 * self.decode_ms) - self.decode_ms
        return self.gap_ms if others_wait else _ALONE_MS

    def _chunks(self, target_ms: float, now_ns: int) -> list[Chunk]:
        """The most urgent prompts first. A small piece of another one is left for later: what is longer or shorter than
        the rest of a call, llama.cpp computes in a call of its own. Who wants the same bits goes alone. The end of a
        prompt may take longer than a larger piece of it, and is cut as well where somebody waits.
        """
        left_ms, self._left_ms = self._left_ms, 0.0
        waiting = [(slot, s) for slot, s in enumerate(self.slots) if s is not None and s.phase is Phase.PREFILL]
        waiting = [(slot, s) for slot, s in waiting if s not in self.sharing.followers]
        if not waiting:
            return []
        waiting.sort(key=lambda item: self._urgency_ms(item[1], now_ns))
        depth = waiting[0][1].computed
        budget = left = self.prompt_cost.rows_within(target_ms, depth, self.n_batch, left_ms)
        chunks = list[Chunk]()
        for slot, sequence in waiting:
            if sequence.request.reproducible:
                if chunks:
                    continue
                return [Chunk(sequence, slot, min(EXACT_CHUNK, sequence.prompt_remaining))]
            reach = self._reach(sequence)
            count = min(reach, left)
            if count < left and target_ms < _ALONE_MS:
                count = self.prompt_cost.rows_within(target_ms, sequence.computed, count)
            if count == reach or not chunks or count >= budget // 2:
                chunks += [Chunk(sequence, slot, count)] if count else []
                left -= count
        if not left and target_ms < _ALONE_MS:
            over_ms = self.prompt_cost.left_ms(target_ms, budget, depth, left_ms)
            self._left_ms = min(over_ms, _MOST_LEFT * target_ms)
        return sorted(chunks, key=lambda chunk: chunk.slot)

    def _reach(self, sequence: Sequence) -> int:
        """Tokens to the end of the prompt, or to where others wait to take it over."""
        border = self.sharing.border(sequence)
        return (len(sequence.prompt) if border is None else border) - sequence.computed

    def _urgency_ms(self, sequence: Sequence, now_ns: int) -> float:
        """Shortest remaining prompt first, but who waits longer than a prompt takes comes before it."""
        waited_ms = (now_ns - sequence.admitted_ns) / _NS_PER_MS
        remaining = sequence.prompt_remaining
        return remaining * self.prompt_cost.ms_per_row(remaining, sequence.computed + remaining / 2) - waited_ms


def _rank(sequence: Sequence) -> int:
    """Where among the slots: who decodes with others, who decodes alone, whose prompt is computed."""
    return 2 if sequence.phase is Phase.PREFILL else int(sequence.request.reproducible)


def _learn(known: float, seen: float) -> float:
    return seen if not known else known + _LEARNING_RATE * (seen - known)
