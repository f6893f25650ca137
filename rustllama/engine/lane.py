"""One llama.cpp context at work: its scheduler, its runner, and the greenlet that steps them."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rustllama import bridge
from rustllama.core import Delta, GenerateRequest, Progress, Queued
from rustllama.engine.black_box import Witness
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.native import Context, Model
from rustllama.engine.runner import Deltas, Runner
from rustllama.engine.scheduler import Scheduler
from rustllama.engine.sequence import Sequence
from rustllama.engine.sharing import Fetch
from rustllama.engine.tally import ModelTally
from rustllama.engine.threads import Threads
from rustllama.engine.turns import Claim, Share
from rustllama.errors import InternalError, RustllamaError
from rustllama.settings import FOREVER

_LINGER_S = 0.5
_PATIENCE_S = 0.5
_MEASURING_MS = 1_500  # in one rest
_log = logging.getLogger("rustllama.engine")


@dataclass(frozen=True, slots=True)
class LaneShape:
    """How a context is made and used; `n_ctx` is the tokens of a slot."""

    n_ctx: int
    n_slots: int
    n_batch: int
    n_threads: int
    may_draft: bool
    flash_attention: str
    kv_cache_type: str

    def open(self, model: Model) -> Context:
        """Blocks: call it in a worker thread. Raises OutOfMemory."""
        return Context(
            model,
            n_ctx=self.n_ctx,
            n_slots=self.n_slots,
            n_batch=self.n_batch,
            n_threads=self.n_threads,
            flash_attention=self.flash_attention,
            kv_cache_type=self.kv_cache_type,
        )


class Lane:
    """All methods are called in the hub."""

    def __init__(
        self,
        context: Context,
        shape: LaneShape,
        scheduler: Scheduler,
        native: bridge.NativeThreads,
        share: Share,
        witness: Witness,
        threads: Threads,
    ):
        self.shape = shape
        self.idle_since_s = time.monotonic()
        self._native = native
        self._turns = share.turns
        self._granted = bridge.Event()
        self._claim = Claim(share, self._granted.set)
        self._context = context
        self._relay: bridge.Relay[Deltas] = bridge.Relay(self._deliver)
        self._runner = Runner(context, self._relay.post, self._may_go_on, threads=threads, may_draft=shape.may_draft)
        self._scheduler = scheduler
        self.check_room = scheduler.check_room
        self._witness = witness
        self._work = bridge.Event()
        self._stopped = bridge.Event()
        self._closing = False
        bridge.spawn(self._loop)

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def queued(self) -> int:
        return len(self._scheduler.queue)

    @property
    def decode_ms(self) -> tuple[float, ...]:
        """See `costs.DecodeCost`."""
        return tuple(self._scheduler.decode_cost.ms)

    @property
    def unmeasured(self) -> int:
        return len(self._scheduler.decode_cost.wanted)

    @property
    def cells_used(self) -> int:
        return sum(sequence.computed for sequence in self._scheduler.slots if sequence is not None)

    @property
    def can_shift(self) -> bool:
        return self._context.can_shift

    @property
    def ended(self) -> list[Sequence]:
        """Sequences that are over, and whose state is still to be saved and cleared."""
        return self._scheduler.ended

    def submit(self, request: GenerateRequest, tally: ModelTally, timeout_s: float) -> LaneStream:
        """`timeout_s` is how long it may take, 0: for ever. Raises Busy."""
        mailbox: bridge.Mailbox[Delta] = bridge.Mailbox()
        sequence = Sequence(request, mailbox, time.perf_counter_ns(), tally=tally)
        self._scheduler.add(sequence)
        self._wake()
        limited = 0 < timeout_s < FOREVER
        timer = bridge.Timer(timeout_s, lambda: self._expire(sequence)) if limited else None
        return LaneStream(self, sequence, mailbox, timer)

    def _deliver(self, deltas: Deltas) -> None:
        if deltas:
            self._witness.unmark()
        for sequence, delta in deltas:
            if isinstance(delta, InternalError) or delta.text or delta.finish is not None:
                sequence.outlet.put(delta)

    def progress(self, sequence: Sequence) -> Progress | None:
        """None where there is nothing to tell."""
        if sequence.cancelled:
            return None
        position = self._scheduler.position(sequence)
        return Queued(position) if position else sequence.reading

    def cancel(self, sequence: Sequence) -> None:
        if not sequence.over:
            self._scheduler.cancel(sequence)
            self._drop(sequence)

    def _expire(self, sequence: Sequence) -> None:
        if not sequence.over:
            self._scheduler.expire(sequence, time.perf_counter_ns())
            self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._runner.abort(sequence)
        self._wake()

    def end_all(self, reason: RustllamaError) -> None:
        self._scheduler.end_all(reason)
        self._wake()

    def close(self) -> None:
        """Waits for the step that runs, then frees the context."""
        self.end_all(InternalError("the model was unloaded."))
        self._closing = True
        self._wake()
        self._stopped.wait()
        self._native.call(self._runner.close)
        self._native.call(self._context.close)
        self._relay.close()

    def check_integrity(self) -> None:
        """Our record of every slot equals llama.cpp's; called while nothing runs."""
        self._native.call(self._runner.check_integrity, self._scheduler.slots)

    def _wake(self) -> None:
        # a run that goes ahead of the scheduler has to end where there is something to decide
        self._runner.interrupted = self._closing or self._scheduler.can_admit or self._scheduler.must_clear
        self._work.set()

    def _loop(self) -> None:
        while self._work.is_set() or not self._closing:
            try:
                if self._work.is_set():
                    self._linger()
                    self._compute()
                else:
                    self._rest()
            except Exception as error:  # whatever it is, nobody may be left waiting
                self._fail(error)
        self._stopped.set()

    def _compute(self) -> None:
        """Takes a turn: steps until others should have theirs, or nothing is to be done."""
        with self._turn():
            while self._step() and not self._scheduler.only_ended and not self._turns.over(time.perf_counter_ns()):
                pass

    def _linger(self) -> None:
        """Where nothing runs, what ended is saved only after a while: programs send the next turn of a conversation at
        once, and it goes on in the same slot.
        """
        if self._scheduler.only_ended and not self._closing:
            self._work.clear()
            self._work.wait(_LINGER_S)
            self._work.set()

    def _step(self) -> bool:
        """Runs a batch; False when there is nothing to do."""
        self._runner.interrupted = False
        batch = self._scheduler.plan(time.perf_counter_ns(), others_wait=bool(self._turns.waiting))
        fetches = self._scheduler.sharing.fetches
        while fetches:
            bridge.spawn(functools.partial(self._fetch, fetches.pop()))
        if batch is None:
            self._work.clear()
            return False
        self._witness.works_for(self._scheduler.running)
        self._scheduler.apply(self._native.call(self._runner.run, batch))
        return True

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Waits for this lane's turn in the native thread; inside, nobody else computes."""
        self._granted.clear()
        self._turns.ask(self._claim, time.perf_counter_ns())
        try:
            self._granted.wait()
            yield
        finally:
            self._witness.rests()
            self._turns.leave(self._claim, time.perf_counter_ns())

    def _may_go_on(self) -> bool:
        """Called in the native thread."""
        return not self._native.contended and not self._turns.over(time.perf_counter_ns())

    def _rest(self) -> None:
        """Waits for work. If none comes for a while, decode calls are measured; who comes then waits for one."""
        self.idle_since_s = time.monotonic()
        cost, patience_s, spent_ms = self._scheduler.decode_cost, _PATIENCE_S, 0.0
        while cost.wanted:
            if spent_ms > _MEASURING_MS or self._work.wait(patience_s):
                break
            if self._turns.holder is not None:
                patience_s = _PATIENCE_S
                continue
            rows = cost.wanted[0]
            with self._turn():
                timing = self._native.call(self._runner.measure, rows)
            spent_ms += timing.ms
            if timing.crowded:
                patience_s = max(_PATIENCE_S, 2 * patience_s)  # others compute, and may do so for long
            else:
                cost.measured(rows, timing.ms)
                # what disturbed the last try would disturb one that follows it at once, and the two would agree
                patience_s = _PATIENCE_S if cost.wanted[:1] == [rows] else 0.0
        self._work.wait()

    def _fetch(self, fetch: Fetch) -> None:
        shelf = self._scheduler.sharing.shelf
        assert shelf is not None
        assert shelf.disk is not None
        try:
            shelf.disk.fetch(fetch.stored)
        finally:
            fetch.goes_on = False
            self._wake()

    def _fail(self, error: Exception) -> None:
        """The step was lost, and with it the state of all who took part; those in the queue go on."""
        _log.error("a step failed", exc_info=error)
        reason = error if isinstance(error, RustllamaError) else InternalError("the engine failed in a step.")
        self._scheduler.lose_all(reason)
        self._scheduler.decode_cost = DecodeCost()  # whatever shape failed, the plain one is the safest
        self._native.call(self._runner.reset)


class LaneStream:
    """The answer to one request; see `core.Stream`."""

    def __init__(
        self, lane: Lane, sequence: Sequence, mailbox: bridge.Mailbox[Delta], timer: bridge.Timer | None
    ) -> None:
        self._lane = lane
        self._sequence = sequence
        self._mailbox = mailbox
        self._timer = timer

    def progress(self) -> Iterator[Progress]:
        return bridge.sampled(self._mailbox.wait, lambda: self._lane.progress(self._sequence))

    def __iter__(self) -> Iterator[Delta]:
        while True:
            delta = self._mailbox.get()
            yield delta
            if delta.finish is not None:
                return

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.close()
        self._lane.cancel(self._sequence)
