"""Carries out a batch in the native thread: arranges the slots, decodes, samples, and runs ahead while nobody waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from rustllama.core import Delta
from rustllama.engine.arranger import Arranger
from rustllama.engine.batch import Arrangement, Batch, Call, Chunk, Clear, Inherit, Kept, Outcome, Timing
from rustllama.engine.drafts import Drafter
from rustllama.engine.native import Aborted, Context, Sampler
from rustllama.engine.sampling import chain, penalized_tokens
from rustllama.engine.sequence import Phase, Sequence
from rustllama.engine.tally import Source
from rustllama.engine.threads import Threads, Watch
from rustllama.errors import InternalError

_AHEAD_NS = 500_000_000  # sequences grow, and other calls become the cheapest
Deltas = list[tuple[Sequence, Delta | InternalError]]  # an error is the last one of its sequence


class Runner:
    """`run` belongs to the native thread; the hub sets `interrupted` and calls `abort`."""

    def __init__(
        self,
        context: Context,
        emit: Callable[[Deltas], None],
        go_on: Callable[[], bool],
        *,
        threads: Threads,
        may_draft: bool,
    ) -> None:
        """`emit` gets each step's deltas; `go_on` tells, after a step, whether to run ahead.

        `may_draft`: a state may be cut behind a draft that did not come true.
        """
        self.interrupted = False
        self._model = context.model
        self._context = context
        self._emit = emit
        self._go_on = go_on
        self._arranger = Arranger(context)
        self._threads = threads
        self._may_draft = may_draft
        self._samplers: dict[Sequence, Sampler] = {}
        self._alone: Sequence | None = None  # whose prompt call runs now, and carries nobody else
        self._lock = threading.Lock()

    def run(self, batch: Batch) -> Outcome:
        """One step, and further decode steps while nothing else is to be done."""
        kept = tuple(self._arrange(batch.arrange))
        decode, shifted, plan_again_ns = tuple[Timing, ...](), False, time.perf_counter_ns() + _AHEAD_NS
        while batch.decode:
            shifted = self._make_room(batch.decode)
            decode = tuple([self._decode(call) for call in batch.decode])
            ended = any(sequence.over for call in batch.decode for sequence in call.sequences)
            busy = batch.prompt or batch.awaited or ended or self.interrupted or not self._go_on()
            if busy or time.perf_counter_ns() > plan_again_ns:
                break
        return Outcome(() if shifted else decode, self._prompt(batch.prompt) if batch.prompt else None, kept)

    def measure(self, rows: int) -> Timing:
        """Of a decode call on empty slots: a row in each, or all in the first where there are more."""
        slots = range(rows) if rows <= self._context.n_slots else [0] * rows
        positions = [0] * rows if rows <= self._context.n_slots else range(rows)
        watch = self._watch(())
        self._context.decode([0] * rows, positions, slots, True)
        timing = watch.stop(rows, 0.0)
        for slot in set(slots):
            self._context.clear(slot)
        return timing

    def abort(self, sequence: Sequence) -> None:
        """Ends the prompt call that carries this sequence alone, if it runs; called in the hub."""
        with self._lock:
            if self._alone is sequence:
                self._context.abort()

    def check_integrity(self, slots: list[Sequence | None]) -> None:
        """Our record of each slot is llama.cpp's. Called in the native thread, between two batches."""
        for slot, sequence in enumerate(slots):
            last = self._context.bounds(slot)[1]
            assert last == (sequence.computed if sequence else 0) - 1, f"slot {slot}: {last}, recorded {sequence}"
        assert set(self._samplers) <= set(slots), "a sampler outlives its sequence"

    def reset(self) -> None:
        """Empties every slot, after a failure."""
        for slot in range(self._context.n_slots):
            self._context.clear(slot)
        self.close()

    def close(self) -> None:
        while self._samplers:
            self._samplers.popitem()[1].close()

    def _arrange(self, changes: tuple[Arrangement, ...]) -> Iterator[Kept]:
        """Yields the states that are to be kept. The sampler of who has ended goes."""
        yield from self._arranger.carry_out(changes)
        for change in changes:
            if isinstance(change, Clear | Inherit) and change.sequence in self._samplers:
                self._samplers.pop(change.sequence).close()

    def _decode(self, call: Call) -> Timing:
        """A token for each sequence of the call, and more where drafts come true."""
        watch = self._watch(call.sequences)
        drafts = [[] for _ in call.sequences] if watch.crowded else call.drafts()
        scratch = [] if drafts[0] else [0] * call.scratch
        tokens, positions, slots = list[int](), list[int](), list[int]()
        for slot, (sequence, draft) in enumerate(zip(call.sequences, drafts, strict=True), call.slot):
            tokens += [sequence.tokens[-1], *draft]
            positions += range(sequence.computed, sequence.computed + 1 + len(draft))
            slots += [slot] * (1 + len(draft))
        spare = range(call.slot + len(call.sequences), call.slot + len(call.sequences) + len(scratch))
        # scratch rows ask for logits too, or the last layer and the head run in the shape that was to be avoided
        self._context.decode(tokens + scratch, positions + scratch, [*slots, *spare], True)
        timing = watch.stop(len(tokens) + len(scratch), max(positions))
        now_ns = time.perf_counter_ns()
        for slot in spare:
            self._context.clear(slot)
        call.sequences[0].tally.decode_ns += timing.ns
        self._emit([delta for place in range(len(drafts)) for delta in self._take(call, place, drafts[place], now_ns)])
        return timing

    def _watch(self, sequences: Iterable[Sequence]) -> Watch:
        """Gives the call that follows its threads.

        A reproducible answer has always as many: llama.cpp cuts attention over long contexts into a part for each.
        """
        watch = self._threads.watch(all_of_them=any(sequence.request.reproducible for sequence in sequences))
        self._context.use(watch.n_threads)
        return watch

    def _take(self, call: Call, place: int, draft: list[int], now_ns: int) -> Iterator[tuple[Sequence, Delta]]:
        """The token that follows, and one more for each drafted one that came true; what was computed beyond is cut."""
        sequence, row = call.sequences[place], place * (1 + len(draft))
        for count in range(1 + len(draft)):
            sequence.computed += 1
            yield sequence, self._sample(sequence, row + count, now_ns)
            if sequence.over or draft[count : count + 1] != sequence.tokens[-1:]:
                break
        sequence.tally.drafts_accepted += count
        sequence.tally.drafts_rejected += len(draft) - count
        if count < len(draft):
            self._context.cut(call.slot + place, sequence.computed)

    def _make_room(self, calls: tuple[Call, ...]) -> bool:
        """Whether some context was full, so that the first of the calls moves its cells."""
        full = [(slot, s) for call in calls for slot, s in enumerate(call.sequences, call.slot) if s.is_full]
        for slot, sequence in full:
            self._context.drop(slot, *sequence.make_room())
        return bool(full)

    def _sample(self, sequence: Sequence, row: int, now_ns: int) -> Delta:
        token = self._context.sample(self._samplers[sequence], row)
        return sequence.accept(token, self._model.answer_piece(token), now_ns)

    def _prompt(self, chunks: tuple[Chunk, ...]) -> Timing | None:
        """Computes the chunks in one call; prompts that are complete with it give their first token."""
        watch = self._watch(chunk.sequence for chunk in chunks)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        finished: list[tuple[Chunk, int]] = []
        for chunk in chunks:
            start = chunk.sequence.computed
            tokens += chunk.sequence.tokens[start : start + chunk.count]
            positions += range(start, start + chunk.count)
            slots += [chunk.slot] * chunk.count
            if chunk.count == chunk.sequence.prompt_remaining:
                finished.append((chunk, len(tokens) - 1))
        outputs = np.zeros(len(tokens), np.int8)
        outputs[[row for _, row in finished]] = 1
        if not self._call(chunks, tokens, positions, slots, outputs):
            return None
        timing = watch.stop(len(tokens), sum(positions) / len(tokens))
        chunks[0].sequence.tally.prompt_ns += timing.ns
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
            chunk.sequence.tally.prompt_tokens[Source.COMPUTED] += chunk.count
        self._emit([(chunk.sequence, self._first(chunk, row)) for chunk, row in finished])
        return timing

    def _call(
        self,
        chunks: tuple[Chunk, ...],
        tokens: list[int],
        positions: list[int],
        slots: list[int],
        outputs: np.ndarray[tuple[int], np.dtype[np.int8]],
    ) -> bool:
        """False when the call was aborted: its only sequence is cancelled, and cleared by the next plan."""
        with self._lock:
            self._alone = chunks[0].sequence if len(chunks) == 1 else None
        try:
            self._context.decode(tokens, positions, slots, outputs)
            return True
        except Aborted:
            self._recount(chunks[0])
            return False
        finally:
            with self._lock:
                self._alone = None
                self._context.rearm()

    def _recount(self, aborted: Chunk) -> None:
        """llama.cpp takes an aborted call back, but for a recurrent state, of which nothing can be used any more."""
        if self._context.bounds(aborted.slot)[1] != aborted.sequence.computed - 1:
            aborted.sequence.computed = 0

    def _first(self, chunk: Chunk, row: int) -> Delta | InternalError:
        """The first token of the answer, or why there is none."""
        if np.isfinite(self._context.logits(row).max()):
            return self._first_token(chunk.sequence, row)
        chunk.sequence.cancelled = True
        chunk.sequence.computed = 0  # nobody may take that over
        self._context.clear(chunk.slot)
        return InternalError("the model computes no finite numbers; its file is damaged or its quantization unfit.")

    def _first_token(self, sequence: Sequence, row: int) -> Delta:
        params = sequence.request.sampling
        stages = chain(params, vocabulary_size=self._model.n_vocab, context_length=sequence.request.num_ctx)
        self._samplers[sequence] = sampler = Sampler(stages)
        last_n = penalized_tokens(params, sequence.request.num_ctx)
        sampler.accept(sequence.tokens[-last_n:] if last_n else ())
        sequence.phase = Phase.DECODE
        if self._may_draft and not sequence.request.reproducible:
            sequence.drafter = Drafter(sequence.tokens)
        return self._sample(sequence, row, time.perf_counter_ns())
