"""One llama.cpp context at work: its scheduler, its runner, and the greenlet that steps them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rustllama import bridge
from rustllama.core import Delta, GenerateRequest
from rustllama.engine.costs import DecodeCost
from rustllama.engine.native import Context, Model
from rustllama.engine.prefix_store import Shelf
from rustllama.engine.runner import Deltas, Runner
from rustllama.engine.scheduler import Scheduler
from rustllama.engine.sequence import Sequence
from rustllama.errors import InternalError, RustllamaError
from rustllama.settings import Settings

_PATIENCE_S = 0.5
_MEASURING_MS = 1_500  # in one rest
_log = logging.getLogger("rustllama.engine")


@dataclass(frozen=True, slots=True)
class LaneShape:
    """How a context is made; `n_ctx` is the tokens of a slot."""

    n_ctx: int
    n_slots: int
    n_batch: int
    n_threads: int


class Lane:
    """All methods are called in the hub, but `open`, which runs in a worker thread."""

    def __init__(
        self,
        model: Model,
        context: Context,
        shape: LaneShape,
        settings: Settings,
        native: bridge.NativeThreads,
        shelf: Shelf | None,
        *,
        may_draft: bool,
    ):
        self.shape = shape
        self.idle_since_s = time.monotonic()
        self._native = native
        self._context = context
        self._relay: bridge.Relay[Deltas] = bridge.Relay(_deliver)
        self._runner = Runner(model, context, self._relay.post, lambda: not native.contended, may_draft=may_draft)
        self._scheduler = Scheduler(shape.n_slots, shape.n_batch, settings.max_queue, settings.gap_ms, shelf)
        self._scheduler.decode_cost = DecodeCost(shape.n_slots)
        self._work = bridge.Event()
        self._stopped = bridge.Event()
        self._closing = False
        bridge.spawn(self._loop)

    @staticmethod
    def open(model: Model, shape: LaneShape, settings: Settings) -> Context:
        """Raises OutOfMemory."""
        return Context(
            model,
            n_ctx=shape.n_ctx,
            n_slots=shape.n_slots,
            n_batch=shape.n_batch,
            n_threads=shape.n_threads,
            flash_attention=settings.flash_attention,
            kv_cache_type=settings.kv_cache_type,
        )

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def queued(self) -> int:
        return len(self._scheduler.queue)

    @property
    def ended(self) -> list[Sequence]:
        """Sequences that are over, and whose state is still to be saved and cleared."""
        return self._scheduler.ended

    def submit(self, request: GenerateRequest) -> LaneStream:
        """Raises Busy."""
        mailbox: bridge.Mailbox[Delta] = bridge.Mailbox()
        sequence = Sequence(request, mailbox, time.perf_counter_ns())
        self._scheduler.add(sequence)
        self._wake()
        return LaneStream(self, sequence, mailbox)

    def cancel(self, sequence: Sequence) -> None:
        if not sequence.over:
            self._scheduler.cancel(sequence)
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
        while True:
            self._work.clear()
            self._runner.interrupted = False
            batch = self._scheduler.plan(time.perf_counter_ns())
            if batch is None and self._closing:
                break
            try:
                if batch is None:
                    self._rest()
                else:
                    self._scheduler.apply(self._native.call(self._runner.run, batch))
            except Exception as error:  # whatever it is, nobody may be left waiting
                self._fail(error)
        self._stopped.set()

    def _rest(self) -> None:
        """Waits for work. If none comes for a while, decode calls are measured; who comes then waits for one."""
        self.idle_since_s = time.monotonic()
        cost, patience_s, spent_ms = self._scheduler.decode_cost, _PATIENCE_S, 0.0
        while rows := cost.wanted:
            if spent_ms > _MEASURING_MS or self._work.wait(patience_s):
                break
            patience_s = 0.0 if self._native.idle else _PATIENCE_S
            if self._native.idle:
                ms = self._native.call(self._runner.measure, rows)
                cost.measured(rows, ms)
                spent_ms += ms
        self._work.wait()

    def _fail(self, error: Exception) -> None:
        """The step was lost, and with it the state of all who took part; those in the queue go on."""
        _log.error("a step failed", exc_info=error)
        reason = error if isinstance(error, RustllamaError) else InternalError("the engine failed in a step.")
        self._scheduler.lose_all(reason)
        self._scheduler.decode_cost = DecodeCost()  # whatever shape failed, the plain one is the safest
        self._native.call(self._runner.reset)


class LaneStream:
    """The answer to one request; see `core.Stream`."""

    def __init__(self, lane: Lane, sequence: Sequence, mailbox: bridge.Mailbox[Delta]) -> None:
        self._lane = lane
        self._sequence = sequence
        self._mailbox = mailbox

    def __iter__(self) -> Iterator[Delta]:
        while True:
            delta = self._mailbox.get()
            yield delta
            if delta.finish is not None:
                return

    def cancel(self) -> None:
        self._lane.cancel(self._sequence)


def _deliver(deltas: Deltas) -> None:
    for sequence, delta in deltas:
        if delta.text or delta.finish is not None:
            sequence.outlet.put(delta)
