"""The process-global manager: which models are loaded, who uses them, how long they stay, and who has to leave."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Generator, Mapping
from typing import Protocol

from rustllama import bridge
from rustllama.core import Engine, Loading, LoadOptions, MemoryPlan, ModelInfo, ModelRecord
from rustllama.engine import memory
from rustllama.engine.facts import Facts
from rustllama.engine.lease import Entry, Key, Lease, LoadedModel
from rustllama.engine.loading import LoadGauge
from rustllama.engine.machine import free_memory_bytes
from rustllama.engine.prefix_store import StoreState
from rustllama.engine.tally import ModelTally, Tally, Unloaded
from rustllama.errors import Cancelled, Draining, InternalError, RustllamaError
from rustllama.settings import Settings

_DRAIN_POLL_S = 0.05
_SLOTS = "slots"  # a fact: by the tokens of a slot, how many there were
_log = logging.getLogger("rustllama.manager")


class EngineFactory(Protocol):
    """Makes engines, and keeps what outlives them."""

    tally: Tally

    @property
    def prompt_cache_bytes(self) -> int:
        """Memory that computed prompts may take, apart from the engines."""

    def prefers_plain_attention(self, record: ModelRecord, options: LoadOptions) -> bool:
        """Whether the model is clearly faster without flash attention, where the setting leaves that open."""

    def __call__(
        self, record: ModelRecord, options: LoadOptions, plan: MemoryPlan, tell: Callable[[float], None], /
    ) -> Engine:
        """Loads the model. Raises BadModelFile or OutOfMemory.

        `tell` gets the share that is loaded, from 0 to 1, in any thread.
        """

    def forget(self, digest: str) -> None:
        """Drops the computed prompts of a model."""

    def stores(self) -> tuple[StoreState, ...]:
        """Where computed prompts are kept."""

    def flush(self) -> None:
        """Puts on disk what is to outlive the process, where that is switched on."""


class EngineManager:
    """One for the process, made by the application factory. All methods are called from greenlets of its hub."""

    def __init__(self, settings: Settings, engine_factory: EngineFactory, facts: Facts | None = None) -> None:
        self.draining = False
        self._settings = settings
        self._factory = engine_factory
        self._facts = facts or Facts()
        self._entries: dict[Key, Entry] = {}
        self._loading = bridge.RLock()  # one load at a time, so that memory is counted once
        self._released = bridge.Event()
        limit = settings.memory_limit or free_memory_bytes()
        self._limit_bytes = limit - min(limit, engine_factory.prompt_cache_bytes)

    def acquire(
        self,
        record: ModelRecord,
        options: LoadOptions = LoadOptions(),  # noqa: B008 - frozen
        *,
        num_ctx: int | None = None,
        keep_alive_s: float | None = None,
    ) -> Lease:
        """Loads the model if need be. Raises Draining, OutOfMemory, BadModelFile, Quarantined.

        `num_ctx` None is the usual context; more than the model was trained for becomes that, with a warning.
        """
        return _result(self.acquiring(record, options, num_ctx=num_ctx, keep_alive_s=keep_alive_s))

    def acquiring(
        self,
        record: ModelRecord,
        options: LoadOptions,
        *,
        num_ctx: int | None,
        keep_alive_s: float | None,
        progress: bool = False,
    ) -> Generator[Loading, None, Lease]:
        """`acquire` that tells, where `progress` asks for it, how far a load is that has to be waited for."""
        if self.draining:
            raise Draining("the server is shutting down: try again in a moment.")
        started_ns = time.perf_counter_ns()
        entry = self._entry(record, options)
        entry.references += 1
        entry.keep_alive_s = self._settings.keep_alive if keep_alive_s is None else keep_alive_s
        lease = None
        try:
            was_ready = entry.ready.is_set()
            if progress and not was_ready:
                yield from bridge.sampled(entry.ready.wait, entry.loading)
            entry.ready.wait()
            if entry.error is not None:
                raise entry.error
            allowed, warnings = entry.context(num_ctx)
            if entry.is_outgrown_by(allowed):
                bridge.shielded(functools.partial(self._reserve, entry, allowed))
            load_ns = 0 if was_ready else time.perf_counter_ns() - started_ns
            lease = Lease(entry, self._release, load_ns, allowed, (*warnings, *entry.unused(options)))
            return lease
        finally:
            if lease is None:
                self._release(entry)

    def unload(self, record: ModelRecord, *, forget: bool = False) -> None:
        """At once when the model is idle or not loaded, else when its last request ends.

        `forget`: its computed prompts leave with it.
        """
        entry = self._entries.get((record.path, record.identity))
        if entry is not None:
            entry.keep_alive_s, entry.forget = 0.0, forget
            self._retire_when_idle(entry)
        elif forget:
            self._factory.forget(record.digest)

    def loaded(self) -> list[LoadedModel]:
        return [
            LoadedModel(entry.record, entry.engine.state(), entry.expires_at)
            for entry in self._entries.values()
            if entry.engine is not None
        ]

    def drain(self, timeout_s: float) -> None:
        """Refuses new requests, waits for the running ones, ends what is left with an error."""
        self.draining = True
        deadline_s = time.monotonic() + timeout_s
        while self._busy and time.monotonic() < deadline_s:
            bridge.sleep(_DRAIN_POLL_S)
        for entry in self._busy:
            if entry.engine is not None:
                entry.engine.end_all(Draining("the server is shutting down before this answer could end."))
        for entry in list(self._entries.values()):
            self._expire(entry)  # an engine that closes has saved what ended just now
        self._factory.flush()

    @property
    def _busy(self) -> list[Entry]:
        return [entry for entry in self._entries.values() if entry.references]

    def _entry(self, record: ModelRecord, options: LoadOptions) -> Entry:
        entry = self._entries.get((record.path, record.identity))
        if entry is None:
            entry = made = Entry(record, options, LoadGauge(record.info.size_bytes))
            self._entries[entry.key] = entry
            bridge.spawn(lambda: self._load(made))
        return entry

    def _load(self, entry: Entry) -> None:
        """In a greenlet of its own: a client that leaves must not stop a load that others wait for."""
        try:
            with self._loading:
                if not entry.references:
                    raise Cancelled
                entry.engine = self._make(entry)
        except RustllamaError as error:
            entry.error = error
        finally:
            if entry.engine is None:
                entry.error = entry.error or InternalError("the model could not be loaded; the server's log says why.")
                if not isinstance(entry.error, Cancelled):
                    self._tally(entry).failed_loads += 1
                self._forget(entry)
            entry.ready.set()
            if not entry.references:
                self._retire_when_idle(entry)  # all who waited have left

    def _make(self, entry: Entry) -> Engine:
        record = entry.record
        self._facts.check(record)
        slots_before = self._facts.get(record.digest, _SLOTS, dict[int, int]) or {}
        plain = self._factory.prefers_plain_attention(record, entry.options)
        entry.plan = plan = self._make_room(record.info, slots_before, plain_attention=plain)
        _log.info("loading %s: %s", record.name, memory.told(plan))
        started_ns = time.perf_counter_ns()
        entry.gauge.start()
        engine = self._factory(record, entry.options, plan, entry.gauge.tell)
        entry.gauge.tell(1.0)
        self._tally(entry).loads.observe(time.perf_counter_ns() - started_ns)
        if slots_before.get(plan.n_ctx) != plan.n_slots:
            self._facts.keep(record.digest, _SLOTS, {**slots_before, plan.n_ctx: plan.n_slots})
        return engine

    def _tally(self, entry: Entry) -> ModelTally:
        return self._factory.tally.models[entry.record.name]

    def _make_room(self, info: ModelInfo, slots_before: Mapping[int, int], *, plain_attention: bool) -> MemoryPlan:
        """Idle models leave before a context is made shorter; when all are busy, the load waits for one of them."""
        memory.refuse_what_never_fits(info, self._settings, self._available() + self._used_bytes)
        plan_in = functools.partial(
            memory.plan, info, self._settings, slots_before=slots_before, plain_attention=plain_attention
        )
        while True:
            available = self._available()
            plan = plan_in(available, squeeze=False)
            if plan is None and self._evict():
                continue
            plan = plan or plan_in(available, squeeze=True)
            if plan is not None:
                return plan
            if not self.loaded():
                return memory.mapped_plan(info, self._settings, available)
            self._released.clear()
            self._released.wait()

    def _available(self) -> int:
        left = self._limit_bytes - self._used_bytes
        return left if self._settings.memory_limit else min(left, free_memory_bytes())

    @property
    def _used_bytes(self) -> int:
        return sum(entry.engine.state().size_bytes for entry in self._entries.values() if entry.engine is not None)

    def _evict(self) -> bool:
        idle = [entry for entry in self._entries.values() if entry.idle]
        if idle:
            self._retire(min(idle, key=lambda entry: entry.used_at_s), Unloaded.EVICTED)
        return bool(idle)

    def _reserve(self, entry: Entry, num_ctx: int) -> None:
        assert entry.engine is not None
        with self._loading:
            entry.engine.reserve(num_ctx, self._available())

    def _release(self, entry: Entry) -> None:
        entry.references -= 1
        entry.used_at_s = time.monotonic()
        self._retire_when_idle(entry)
        self._released.set()

    def _retire_when_idle(self, entry: Entry) -> None:
        if entry.timer is not None:
            entry.timer.close()
            entry.timer = None
        entry.keep_alive()
        if not entry.idle:
            return
        if entry.keep_alive_s <= 0:
            self._retire(entry, Unloaded.ASKED)
        elif entry.expires_at is not None:
            entry.timer = bridge.Timer(entry.keep_alive_s, lambda: self._expire(entry))

    def _expire(self, entry: Entry) -> None:
        if entry.idle:
            self._retire(entry, Unloaded.IDLE)

    def _retire(self, entry: Entry, why: Unloaded) -> None:
        """Frees an idle model. It is forgotten first, so that nobody takes it meanwhile."""
        engine, entry.engine = entry.engine, None
        assert engine is not None
        if entry.timer is not None:
            entry.timer.close()
        self._forget(entry)
        self._tally(entry).unloads[why] += 1
        bridge.shielded(engine.close)
        if entry.forget:
            bridge.shielded(functools.partial(self._factory.forget, entry.record.digest))
        self._released.set()

    def _forget(self, entry: Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]


def _result(steps: Generator[object, None, Lease]) -> Lease:
    """What a generator returns, whatever it yields."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        lease: Lease = end.value
        return lease
