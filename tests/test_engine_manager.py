"""Which models are loaded: counted, kept alive, evicted, drained. The engines are fakes, the clock is real."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import gevent
import pytest

from rustllama.bridge import Event
from rustllama.core import (
    EngineState,
    FileIdentity,
    GenerateRequest,
    Loading,
    LoadOptions,
    MemoryPlan,
    ModelInfo,
    ModelRecord,
    Span,
    Stream,
)
from rustllama.engine.facts import Facts
from rustllama.engine.lease import Lease
from rustllama.engine.manager import EngineManager
from rustllama.engine.tally import Unloaded
from rustllama.errors import BadModelFile, Draining, InternalError, OutOfMemory, RustllamaError
from rustllama.registry import Registry
from rustllama.settings import FOREVER, Settings
from tests.fakes import FakeKeeper
from tests.test_registry import NOWHERE

MIB = 1024**2
INFO = ModelInfo("llama", 1, "F32", 100 * MIB, ("/m",), 1, 4096, 64, 4, (2,), 16, 16, 512)


def record(name: str) -> ModelRecord:
    return ModelRecord(name, f"/models/{name}.gguf", "", "", FileIdentity(0, hash(name), 0, 0), INFO)


@dataclass(slots=True, eq=False)
class FakeEngine:
    record: ModelRecord
    plan: MemoryPlan
    reserved: int = 0
    closed: bool = False
    ended: RustllamaError | None = None
    close_s: float = 0.0

    def tokenize(
        self, spans: tuple[Span, ...], *, add_special: bool, as_written: bool = True, owner: str = ""
    ) -> tuple[int, ...]:
        raise NotImplementedError

    def check_room(self, num_ctx: int) -> None:
        raise NotImplementedError

    def submit(self, request: GenerateRequest) -> Stream:
        raise NotImplementedError

    def reserve(self, num_ctx: int, available_bytes: int) -> None:
        self.reserved = num_ctx

    def state(self) -> EngineState:
        return EngineState(self.plan.n_ctx, self.plan.n_slots, 0, 0, self.plan.size_bytes, 0)

    def end_all(self, reason: RustllamaError) -> None:
        self.ended = reason

    def close(self) -> None:
        assert not self.closed
        gevent.sleep(self.close_s)
        self.closed = True


@dataclass(slots=True)
class Factory(FakeKeeper):
    """Remembers what it made; `before` runs inside each load, half of which is done then."""

    made: list[FakeEngine] = field(default_factory=list)
    before: Callable[[], None] = lambda: None

    def __call__(
        self, record: ModelRecord, options: LoadOptions, plan: MemoryPlan, tell: Callable[[float], None]
    ) -> FakeEngine:
        tell(0.5)
        self.before()
        self.made.append(FakeEngine(record, plan))
        return self.made[-1]


def manager(factory: Factory, limit_mib: int = 250, **settings: object) -> EngineManager:
    return EngineManager(Settings(memory_limit=limit_mib * MIB, **settings), factory)  # type: ignore[arg-type]


def names(made: EngineManager) -> list[str]:
    return [loaded.record.name for loaded in made.loaded()]


def test_many_who_want_one_model_share_one_load() -> None:
    factory = Factory(before=lambda: gevent.sleep(0.01))
    made = manager(factory)
    leases = [g.get() for g in [gevent.spawn(made.acquire, record("a")) for _ in range(5)]]
    assert len(factory.made) == 1
    assert all(lease.load_ns > 0 for lease in leases)
    assert made.acquire(record("a")).load_ns == 0


def test_an_idle_model_stays_until_its_keep_alive_ends() -> None:
    made = manager(factory := Factory())
    made.acquire(record("a"), keep_alive_s=0.01).release()
    assert names(made) == ["a"]
    with gevent.Timeout(5):
        while not factory.made[0].closed:
            gevent.sleep(0.005)
    assert names(made) == []


def test_keep_alive_zero_unloads_when_the_last_request_ends() -> None:
    made = manager(factory := Factory())
    first, second = made.acquire(record("a")), made.acquire(record("a"), keep_alive_s=0)
    second.release()
    assert not factory.made[0].closed
    first.release()
    assert factory.made[0].closed


def test_for_ever_has_no_end() -> None:
    made = manager(Factory())
    made.acquire(record("a"), keep_alive_s=FOREVER).release()
    assert made.loaded()[0].expires_at is None


def test_unload_waits_for_the_running_request() -> None:
    made = manager(factory := Factory())
    lease = made.acquire(record("a"))
    made.unload(record("a"))
    assert not factory.made[0].closed
    lease.release()
    lease.release()
    assert factory.made[0].closed


def test_what_a_busy_model_computed_is_forgotten_when_it_leaves() -> None:
    made = manager(factory := Factory())
    lease = made.acquire(record("a"))
    made.unload(record("a"), forget=True)
    assert factory.forgotten == []
    lease.release()
    assert factory.forgotten == [record("a").digest]


def test_the_least_recently_used_idle_model_makes_room() -> None:
    made = manager(Factory())
    for name in ("a", "b"):
        made.acquire(record(name)).release()
    made.acquire(record("a")).release()
    made.acquire(record("c")).release()
    assert sorted(names(made)) == ["a", "c"]


def test_a_load_waits_for_busy_models_to_become_idle() -> None:
    made = manager(Factory())
    busy = [made.acquire(record(name)) for name in ("a", "b")]
    waiting = gevent.spawn(made.acquire, record("c"))
    gevent.sleep(0.01)
    assert not waiting.ready()
    busy[0].release()
    waiting.get(timeout=5)
    assert sorted(names(made)) == ["b", "c"]


def test_a_model_that_never_fits_is_refused_with_both_figures() -> None:
    made = manager(Factory(), limit_mib=50, use_mmap=False)
    with pytest.raises(OutOfMemory, match=r"needs 0\.1 GiB .* and 0\.0 GiB are free"):
        made.acquire(record("a"))
    assert names(made) == []


def test_nobody_waits_or_leaves_for_a_model_that_never_fits() -> None:
    made = manager(Factory(), use_mmap=False)
    made.acquire(record("idle")).release()
    busy = made.acquire(record("busy"))
    large = replace(record("large"), info=replace(INFO, size_bytes=300 * MIB))
    with pytest.raises(OutOfMemory, match="the model needs"), gevent.Timeout(5):
        made.acquire(large)
    assert sorted(names(made)) == ["busy", "idle"]
    busy.release()


def test_mapped_weights_beyond_the_limit_load_with_a_warning() -> None:
    lease = manager(Factory(), limit_mib=50).acquire(record("a"))
    assert "read from disk again and again" in lease.warnings[0]


def test_a_load_that_fails_is_told_to_all_and_tried_again_later() -> None:
    def fail() -> None:
        gevent.sleep(0.01)
        raise BadModelFile("broken")

    made = manager(factory := Factory(before=fail))
    for greenlet in [gevent.spawn(made.acquire, record("a")) for _ in range(3)]:
        with pytest.raises(BadModelFile, match="broken"):
            greenlet.get()
    factory.before = lambda: None
    made.acquire(record("a")).release()
    assert names(made) == ["a"]


def pass_through(gate: Event) -> None:
    gate.wait()


def follow(made: EngineManager, name: str) -> tuple[list[Loading], Lease]:
    """What a load tells, and its lease."""
    told = []
    acquiring = made.acquiring(record(name), LoadOptions(), num_ctx=None, keep_alive_s=None, progress=True)
    try:
        while True:
            told.append(next(acquiring))
    except StopIteration as end:
        return told, end.value


def test_all_who_want_it_are_told_how_far_a_load_is() -> None:
    go = Event()
    made = manager(Factory(before=lambda: pass_through(go)))
    first = made.acquiring(record("a"), LoadOptions(), num_ctx=None, keep_alive_s=None, progress=True)
    second = gevent.spawn(follow, made, "a")
    assert next(first) == Loading(50 * MIB, 100 * MIB)
    go.set()
    assert [*first] == [Loading(100 * MIB, 100 * MIB)]
    told, lease = second.get()
    assert told[-1] == Loading(100 * MIB, 100 * MIB)
    assert lease.engine is made.acquire(record("a")).engine


def test_a_model_that_is_there_tells_nothing_of_a_load() -> None:
    made = manager(Factory())
    made.acquire(record("a"))
    assert follow(made, "a")[0] == []


def test_a_load_that_waits_for_memory_has_nothing_in_it_yet() -> None:
    made = manager(Factory())
    busy = [made.acquire(record(name)) for name in ("a", "b")]
    waiting = made.acquiring(record("c"), LoadOptions(), num_ctx=None, keep_alive_s=None, progress=True)
    assert next(waiting) == Loading(0, 100 * MIB)
    busy[0].release()
    assert [*waiting][-1] == Loading(100 * MIB, 100 * MIB)


def test_a_load_that_fails_tells_no_end() -> None:
    def fail() -> None:
        pass_through(go)
        raise BadModelFile("broken")

    go = Event()
    waiting = manager(Factory(before=fail)).acquiring(
        record("a"), LoadOptions(), num_ctx=None, keep_alive_s=None, progress=True
    )
    next(waiting)
    go.set()
    with pytest.raises(BadModelFile):
        next(waiting)


def test_who_stops_listening_to_a_load_no_longer_waits_for_it() -> None:
    go = Event()
    made = manager(factory := Factory(before=lambda: pass_through(go)))
    waiting = made.acquiring(record("a"), LoadOptions(), num_ctx=None, keep_alive_s=0, progress=True)
    next(waiting)
    waiting.close()
    go.set()
    with gevent.Timeout(5):
        while not factory.made or not factory.made[0].closed:
            gevent.sleep(0.005)


def test_an_unforeseen_failure_of_a_load_leaves_nobody_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(InternalError, match="log says why"):
        manager(Factory(before=fail)).acquire(record("a"))
    gevent.sleep(0)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_client_that_leaves_during_the_load_leaves_a_model_that_expires() -> None:
    made = manager(factory := Factory(before=lambda: gevent.sleep(0.02)))
    waiting = gevent.spawn(made.acquire, record("a"), keep_alive_s=0)
    gevent.sleep(0.005)
    waiting.kill()
    with gevent.Timeout(5):
        while not factory.made or not factory.made[0].closed:
            gevent.sleep(0.005)


def test_loads_and_why_models_left_are_counted() -> None:
    made = manager(factory := Factory())
    for name in ("a", "b", "c"):
        made.acquire(record(name)).release()  # the third one needs the place of the first
    made.unload(record("b"))
    made.acquire(record("c"), keep_alive_s=0.01).release()
    with gevent.Timeout(5):
        while not factory.made[2].closed:
            gevent.sleep(0.005)
    tallies = factory.tally.models
    assert {name: tally.unloads for name, tally in tallies.items()} == {
        "a": {Unloaded.EVICTED: 1},
        "b": {Unloaded.ASKED: 1},
        "c": {Unloaded.IDLE: 1},
    }
    assert [sum(tally.loads.counts) for tally in tallies.values()] == [1, 1, 1]


def test_a_load_that_nobody_waits_for_any_more_has_not_failed() -> None:
    made = manager(factory := Factory(before=lambda: gevent.sleep(0.02)))
    first = gevent.spawn(made.acquire, record("a"))
    leaving = gevent.spawn(made.acquire, record("b"))
    gevent.sleep(0.005)
    leaving.kill()
    first.get()
    gevent.sleep(0)
    assert [engine.record.name for engine in factory.made] == ["a"]
    assert not any(tally.failed_loads for tally in factory.tally.models.values())


def test_num_ctx_belongs_to_the_request() -> None:
    made = manager(factory := Factory(), num_ctx=2048)
    assert made.acquire(record("a")).num_ctx == 2048
    assert made.acquire(record("a"), num_ctx=100).num_ctx == 100
    assert made.acquire(record("a"), num_ctx=4000).num_ctx == 4000
    assert factory.made[0].reserved == 4000
    assert len(factory.made) == 1


def test_more_context_than_was_trained_is_cut_with_a_warning() -> None:
    lease = manager(Factory()).acquire(record("a"), num_ctx=99_999)
    assert lease.num_ctx == 4096
    assert "trained" in lease.warnings[0]


def test_options_of_a_load_that_is_done_give_a_warning() -> None:
    made = manager(Factory())
    made.acquire(record("a"), LoadOptions(num_thread=1))
    assert made.acquire(record("a"), LoadOptions(num_thread=1)).warnings == ()
    assert "num_thread" in made.acquire(record("a"), LoadOptions(num_thread=2)).warnings[0]


def test_draining_refuses_new_requests_and_ends_what_outlasts_the_timeout() -> None:
    made = manager(factory := Factory())
    lease = made.acquire(record("a"))
    made.drain(timeout_s=0.01)
    assert isinstance(factory.made[0].ended, Draining)
    with pytest.raises(Draining):
        made.acquire(record("a"))
    lease.release()


def test_a_drain_frees_what_is_idle_and_then_puts_prompts_on_disk() -> None:
    made = manager(factory := Factory())
    made.acquire(record("a")).release()
    made.drain(timeout_s=1)
    assert factory.made[0].closed
    assert factory.flushed


def test_a_replaced_file_is_another_model_while_the_old_one_ends() -> None:
    made, old = manager(Factory(), limit_mib=900), record("a")
    lease = made.acquire(old)
    new = replace(old, identity=FileIdentity(0, 1, 1, 1))
    made.acquire(new)
    made.unload(old)
    assert len(made.loaded()) == 2
    lease.release()
    assert [loaded.record for loaded in made.loaded()] == [new]


def test_a_client_that_leaves_while_a_model_is_freed_does_not_stop_that() -> None:
    made = manager(factory := Factory())
    lease = made.acquire(record("a"), keep_alive_s=0)
    factory.made[0].close_s = 0.01
    leaving = gevent.spawn(lease.release)
    gevent.sleep(0)
    leaving.kill()
    with gevent.Timeout(5):
        while not factory.made[0].closed:
            gevent.sleep(0.005)


def test_a_model_gets_as_many_slots_as_before_where_they_fit(tmp_path: Path) -> None:
    with closing(Registry(tmp_path / "rustllama.db", bundled=NOWHERE)) as registry:
        for facts, slots, expected in ((None, None, 16), (Facts(registry), 12, 12), (Facts(registry), None, 12)):
            factory = Factory()
            made = EngineManager(Settings(memory_limit=250 * MIB, slots=slots), factory, facts)
            made.acquire(record("a"))
            assert factory.made[0].plan.n_slots == expected


@pytest.mark.parametrize("plain", [True, False])
def test_a_model_is_laid_out_for_the_attention_that_it_prefers(plain: bool) -> None:
    made = manager(factory := Factory(plain_attention=plain))
    made.acquire(record("a"))
    assert factory.made[0].plan.plain_attention is plain
