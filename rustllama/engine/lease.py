"""A model that is loading or loaded, and the right to use it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from types import TracebackType

from rustllama import bridge
from rustllama.core import Engine, EngineState, FileIdentity, Loading, LoadOptions, MemoryPlan, ModelRecord
from rustllama.engine.loading import LoadGauge
from rustllama.errors import RustllamaError

Key = tuple[str, FileIdentity]
_LONGEST_S = 10**9


@dataclass(slots=True, eq=False)
class Entry:
    """A model that is loading or loaded. `references` counts the leases, and with them those who wait for the load."""

    record: ModelRecord
    options: LoadOptions
    gauge: LoadGauge
    ready: bridge.Event = field(default_factory=bridge.Event)
    engine: Engine | None = None
    plan: MemoryPlan | None = None
    error: RustllamaError | None = None
    references: int = 0
    forget: bool = False  # its computed prompts, when it leaves
    keep_alive_s: float = 0.0
    used_at_s: float = 0.0
    expires_at: datetime | None = None
    timer: bridge.Timer | None = None

    def loading(self) -> Loading | None:
        """How far the load is; None where it failed."""
        return None if self.error else self.gauge.read()

    @property
    def idle(self) -> bool:
        return self.engine is not None and not self.references

    @property
    def key(self) -> Key:
        return self.record.path, self.record.identity

    def keep_alive(self) -> None:
        """Sets when it expires, from now on."""
        forever = math.isinf(self.keep_alive_s)
        span = timedelta(seconds=min(self.keep_alive_s, _LONGEST_S))
        self.expires_at = None if forever else datetime.now(timezone.utc) + span

    def context(self, num_ctx: int | None) -> tuple[int, tuple[str, ...]]:
        """How many tokens a request gets, and what it should be told about them; it may be more than a usual slot."""
        assert self.plan is not None
        trained, warnings = self.record.info.context_length, self.plan.warnings
        if num_ctx is None:
            return min(self.plan.n_ctx, trained or self.plan.n_ctx), warnings
        if trained and num_ctx > trained:
            return trained, (*warnings, f"num_ctx {num_ctx} is more than the model was trained for: {trained} is used")
        return num_ctx, warnings

    def is_outgrown_by(self, num_ctx: int) -> bool:
        """Whether so many tokens need more than a usual slot."""
        assert self.plan is not None
        return num_ctx > self.plan.n_ctx

    def unused(self, options: LoadOptions) -> tuple[str, ...]:
        """A model that is loaded is not loaded again for another number of threads or layers: says so."""
        names = ("num_gpu", "num_thread", "num_batch", "use_mmap")
        return tuple(
            f"{name} is fixed when a model is loaded, and this one was loaded with another value"
            for name in names
            if getattr(options, name) is not None and getattr(options, name) != getattr(self.options, name)
        )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A row of `/api/ps`; `expires_at` None is for ever, and while somebody uses it."""

    record: ModelRecord
    state: EngineState
    expires_at: datetime | None


class Lease:
    """The right to use a loaded model until `release`; a context manager."""

    def __init__(
        self, entry: Entry, release: Callable[[Entry], None], load_ns: int, num_ctx: int, warnings: tuple[str, ...]
    ) -> None:
        assert entry.engine is not None
        self.engine: Engine = entry.engine
        self.loaded_as = entry.record.name  # a file may have more names
        self.load_ns = load_ns
        self.num_ctx = num_ctx
        self.warnings = warnings
        self._release = release
        self._entry: Entry | None = entry

    def release(self) -> None:
        """May be called more than once."""
        if self._entry is not None:
            entry, self._entry = self._entry, None
            self._release(entry)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
