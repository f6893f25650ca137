"""The real scheduler and prefix store under load in virtual time, with a cost model in llama.cpp's place.

So policy can be studied beyond this machine: what would a hundred requests a second do to the gaps of a 1B?
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from rustllama.bench.load import Plan
from rustllama.bench.player import Arrivals
from rustllama.bench.trace import Trace
from rustllama.core import Delta, GenerateRequest
from rustllama.engine.batch import Batch, Call, Chunk, Clear, Copy, Kept, Outcome, Restore, Timing
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.prefix_store import Match, PrefixStore
from rustllama.engine.scheduler import Scheduler
from rustllama.engine.sequence import Phase, Sequence
from rustllama.engine.sharing import Sharing
from rustllama.engine.shelf import Shelf
from rustllama.engine.states import Cuts, Shape
from rustllama.errors import BadRequest, Busy
from rustllama.settings import Settings

_VOCABULARY = 1 << 16
_DEFAULT_SLOTS = 16
_DEFAULT_STORE_BYTES = 1 << 30
_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Machine:
    """What calls take, in milliseconds, on some machine with some model."""

    decode_ms: tuple[float, ...]  # by rows, from one on; more rows go on like the last
    prompt_ms: float  # a row of a prompt call
    cell_ms: float  # a token that a row looks at
    token_bytes: int  # of the KV cache
    bytes_per_ms: int = 10_000_000  # of a state that is copied

    def decode(self, rows: int, cells: int) -> float:
        known = len(self.decode_ms)
        beyond = max(0, rows - known) * self.decode_ms[-1] / known
        return self.decode_ms[min(rows, known) - 1] + beyond + cells * self.cell_ms

    def prompt(self, rows: int, cells: int) -> float:
        return max(rows * self.prompt_ms, self.decode_ms[0]) + cells * self.cell_ms

    def copy(self, tokens: int) -> float:
        return tokens * self.token_bytes / self.bytes_per_ms


# Decode calls of the first two were measured on two cores with AVX2, in Q8_0, but those of 9, 11, 13 and 15 rows, which
# are read between them; what a cell costs is an estimate. The third is a guess at an 8B in 4 bits on a large GPU.
MACHINES = {
    "135m": Machine((6, 16, 20, 25, 28, 31, 32, 26, 29, 32, 32, 31, 34, 37, 33, 29), 1.15, 0.0008, 23_040),
    "1b": Machine((32, 91, 112, 128, 172, 192, 213, 132, 170, 202, 190, 172, 220, 243, 230, 203), 7.2, 0.001, 32_768),
    "gpu": Machine(tuple(5 + rows / 16 for rows in range(64)), 0.1, 0.00002, 131_072, bytes_per_ms=20_000_000),
}


@dataclass(slots=True)
class Clock:
    """Virtual time."""

    ns: int = 0

    def pass_ms(self, ms: float) -> int:
        """Returns the nanoseconds that have passed."""
        passed = round(ms * _NS_PER_MS)
        self.ns += passed
        return passed


@dataclass(slots=True, eq=False)
class _Client:
    """Sends one request and reads its answer, which is a token each time."""

    prompt: tuple[int, ...]
    plan: Plan
    num_ctx: int
    clock: Clock
    started_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    error: str | None = None
    over: bool = False

    def send(self, scheduler: Scheduler) -> None:
        self.started_s = self.clock.ns / 1e9
        answer_tokens = self.plan.answer_tokens
        request = GenerateRequest("", self.prompt, self.num_ctx, max_tokens=answer_tokens)
        try:
            scheduler.add(Sequence(request, self, self.clock.ns))
        except Busy as error:
            self.put(error)

    def put(self, item: Delta | Exception) -> None:
        if isinstance(item, Exception):
            self.error = str(item)
        else:
            self.arrivals.append((self.clock.ns / 1e9, 1))
        self.over = isinstance(item, Exception) or item.finish is not None

    @property
    def trace(self) -> Trace:
        return Trace(self.started_s, tuple(self.arrivals), len(self.prompt), len(self.arrivals), error=self.error)


@dataclass(slots=True)
class Simulation:
    """Runs a plan once. `planning_s` is what the scheduler itself took for each step, in real seconds."""

    plan: Plan
    machine: Machine
    settings: Settings
    planning_s: list[float] = field(default_factory=list)
    _clock: Clock = field(default_factory=Clock)
    _scheduler: Scheduler = field(init=False)
    _chance: random.Random = field(init=False)
    _state: memoryview = field(init=False)  # stands for every state that is saved

    def __post_init__(self) -> None:
        slots, num_ctx = self.settings.slots or _DEFAULT_SLOTS, self.settings.num_ctx
        if self.plan.prompt_tokens + self.plan.answer_tokens > num_ctx:
            raise BadRequest(f"Prompt and answer are longer than a context of {num_ctx}: raise RUSTLLAMA_NUM_CTX.")
        memory = self.settings.prompt_cache_memory
        store = PrefixStore(_DEFAULT_STORE_BYTES if memory is None else memory)
        shelf = Shelf(store, Shape("", num_ctx, slots, "", ""), Cuts(), self.machine.token_bytes)
        self._scheduler = Scheduler(
            slots,
            self.settings.num_batch,
            self.settings.max_queue,
            self.settings.gap_ms,
            Sharing(shelf if store.limit_bytes else None),
            decode_cost=DecodeCost(slots, [0.0, *(self.machine.decode(rows, 0) for rows in range(1, slots + 1))]),
        )
        self._chance = random.Random(self.plan.seed)
        self._state = memoryview(bytes(num_ctx * self.machine.token_bytes))

    def run(self) -> list[Trace]:
        """All answers, in the order of their requests."""
        shared = self._tokens(min(self.plan.shared_prefix, self.plan.prompt_tokens))
        own = self.plan.prompt_tokens - len(shared)
        clients = [self._client(shared + self._tokens(own)) for _ in range(self.plan.requests)]
        waits_s = Arrivals(self.plan.concurrency, self.plan.rate, self.plan.seed).waits_s(len(clients))
        limit = len(clients) if self.plan.rate else self.plan.concurrency
        waiting, live = deque(zip(waits_s, clients, strict=True)), list[_Client]()
        while waiting or live:
            while waiting and len(live) < limit and self._clock.ns >= waiting[0][0] * 1e9:
                live.append(waiting.popleft()[1])
                live[-1].send(self._scheduler)
            if not self._step() and waiting and not live:
                self._clock.ns = math.ceil(waiting[0][0] * 1e9)
            live = [client for client in live if not client.over]
        return [client.trace for client in clients]

    def _client(self, prompt: tuple[int, ...]) -> _Client:
        return _Client(prompt, self.plan, self.settings.num_ctx, self._clock)

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._chance.choices(range(_VOCABULARY), k=count))

    def _step(self) -> bool:
        """Whether there was anything to do."""
        began_s = time.perf_counter()
        batch = self._scheduler.plan(self._clock.ns)
        planned_s = time.perf_counter() - began_s
        if batch is None:
            return False
        outcome = self._play(batch)
        began_s = time.perf_counter()
        self._scheduler.apply(outcome)
        self.planning_s.append(planned_s + time.perf_counter() - began_s)
        return True

    def _play(self, batch: Batch) -> Outcome:
        """What the runner does."""
        kept = tuple(self._arrange(batch))
        decode = tuple([self._decode(call) for call in batch.decode])
        return Outcome(decode, self._prompt(batch.prompt) if batch.prompt else None, kept)

    def _arrange(self, batch: Batch) -> Iterator[Kept]:
        for change in batch.arrange:
            match change:
                case Clear(_, sequence, True):
                    self._clock.pass_ms(self.machine.copy(sequence.computed))
                    state = self._state[: sequence.computed * self.machine.token_bytes]
                    yield Kept(tuple(sequence.tokens), sequence.computed, state, exact=0)
                case Copy(count=count) | Restore(match=Match(count=count)):
                    self._clock.pass_ms(self.machine.copy(count))

    def _decode(self, call: Call) -> Timing:
        rows, depth = len(call.sequences) + call.scratch, max(sequence.computed for sequence in call.sequences)
        passed_ns = self._clock.pass_ms(self.machine.decode(rows, rows * depth))
        for sequence in call.sequences:
            sequence.computed += 1
            self._accept(sequence)
        return Timing(rows, depth, passed_ns)

    def _prompt(self, chunks: tuple[Chunk, ...]) -> Timing:
        rows = sum(chunk.count for chunk in chunks)
        cells = sum(chunk.count * (chunk.sequence.computed + chunk.count // 2) for chunk in chunks)
        passed_ns = self._clock.pass_ms(self.machine.prompt(rows, cells))
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
            if not chunk.sequence.prompt_remaining:
                chunk.sequence.phase = Phase.DECODE
                self._accept(chunk.sequence)
        return Timing(rows, cells / rows, passed_ns)

    def _accept(self, sequence: Sequence) -> None:
        sequence.outlet.put(sequence.accept(self._chance.randrange(_VOCABULARY), b"x", self._clock.ns))
