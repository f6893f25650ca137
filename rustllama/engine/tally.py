"""What the process has done, in plain numbers that only grow: counted where it happens, read by `/metrics`.

No locks: each number is written by one thread, the hub's or the native one, and the hub reads them.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

_NS_PER_MS = 1_000_000


class Source(enum.Enum):
    """Where tokens of a prompt came from."""

    COMPUTED = "computed"
    RUNNING = "running"  # copied from a sequence that ran
    AWAITED = "awaited"  # likewise, after waiting until it had computed them
    MEMORY = "memory"  # saved there
    DISK = "disk"  # saved there


class Unloaded(enum.Enum):
    """Why a model left."""

    EVICTED = "evicted"  # another one needed its memory
    IDLE = "idle"  # its keep_alive ended
    ASKED = "asked"  # by a request, or as its name was deleted or replaced


@dataclass(slots=True)
class Histogram:
    """Durations. `counts[i]` is of those up to `bounds_ns[i]` and above the bound before; the last, of the rest."""

    bounds_ns: tuple[int, ...]
    sum_ns: int = 0
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_ns) + 1)

    def observe(self, duration_ns: int) -> None:
        self.counts[bisect_left(self.bounds_ns, duration_ns)] += 1
        self.sum_ns += duration_ns


def _gaps() -> Histogram:
    """Dense around the default RUSTLLAMA_GAP_MS."""
    return _histogram(5, 10, 20, 30, 50, 75, 100, 150, 200, 250, 300, 400, 600, 1_000, 2_500, 5_000)


def _waits() -> Histogram:
    return _histogram(10, 25, 50, 100, 200, 400, 800, 1_500, 3_000, 6_000, 12_000, 30_000, 60_000, 120_000, 300_000)


def _histogram(*bounds_ms: int) -> Histogram:
    return Histogram(tuple(bound * _NS_PER_MS for bound in bounds_ms))


@dataclass(slots=True)
class ModelTally:
    """Of one model. Written by the hub, but for what the native thread notes with each token."""

    loads: Histogram = field(default_factory=_waits)
    failed_loads: int = 0
    unloads: Counter[Unloaded] = field(default_factory=Counter)
    queue: Histogram = field(default_factory=_waits)  # from arrival at the engine to a slot
    first_token: Histogram = field(default_factory=_waits)  # from the request's head, loading and queue included
    gaps: Histogram = field(default_factory=_gaps)  # between the tokens of a sequence's steps; native thread
    prompts: Counter[Source] = field(default_factory=Counter)  # whose first token was sampled; native thread
    prompt_tokens: Counter[Source] = field(default_factory=Counter)  # native thread
    answer_tokens: int = 0  # native thread
    decode_ns: int = 0  # in llama.cpp's calls; native thread
    prompt_ns: int = 0  # likewise
    drafts_accepted: int = 0  # tokens; native thread
    drafts_rejected: int = 0


class Ended(NamedTuple):
    """How a request went."""

    model: str  # the name that was asked for; "" without one that exists
    status: int
    outcome: str  # why the answer ended, the code of an error, or "ok"


@dataclass(slots=True)
class Tally:
    """Of the whole process; outlives the models."""

    requests: Counter[Ended] = field(default_factory=Counter)
    models: defaultdict[str, ModelTally] = field(default_factory=lambda: defaultdict(ModelTally))
    """By the name that a model was loaded under."""
