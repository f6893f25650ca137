"""With flash attention or without: what is faster on a machine is taken, where memory allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from rustllama import gguf
from rustllama.core import LoadOptions, MemoryPlan
from rustllama.engine.attention import Call, Heads, prefers_plain
from rustllama.engine.engine import LlamaEngines
from rustllama.engine.facts import Facts
from rustllama.engine.native import plain_is_faster
from rustllama.engine.native.attention import attention_ms
from rustllama.engine.prompt_cost import FLASH_TILE
from rustllama.errors import OutOfMemory
from rustllama.settings import Settings
from tests.test_engine_lane import N_CTX, SLOTS, ask, last, record

T = TypeVar("T")

# Milliseconds of a prompt's call and of a decode call, on two cores: with flash attention, and without.
XEON_64 = (5.7, 9.2), (2.6, 0.57)  # heads of 64 channels, shorter than a vector of this processor
XEON_128 = (8.2, 12.3), (0.9, 0.84)
EVEN = (1.0, 1.0), (1.0, 1.0)
GAIN_OF_A_TENTH = (1.0, 0.9), (1.0, 0.9)


@pytest.mark.parametrize(("ms", "plain"), [(XEON_64, True), (XEON_128, False), (EVEN, False), (GAIN_OF_A_TENTH, False)])
def test_plain_attention_has_to_be_clearly_faster(ms: tuple[tuple[float, float], ...], plain: bool) -> None:
    assert prefers_plain(lambda call, flash: ms[call.rows == 1][not flash]) is plain


def test_a_disturbance_that_does_not_last_changes_nothing() -> None:
    asked = list[Call]()

    def disturbed(call: Call, flash: bool) -> float:
        asked.append(call)
        return XEON_64[call.rows == 1][not flash] * (100 if len(asked) % 9 < 4 else 1)

    assert prefers_plain(disturbed)


HEADS = [Heads(4, 4, 32, 32), Heads(9, 3, 64, 64), Heads(8, 1, 256, 256), Heads(16, 2, 192, 128), Heads(71, 1, 64, 64)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kv_cache_type", ["f16", "f32"])
@pytest.mark.parametrize("flash", [True, False])
def test_heads_of_all_shapes_can_be_measured(heads: Heads, kv_cache_type: str, flash: bool) -> None:
    for call in (Call(1, 256, 4), Call(128, 256, 1)):
        assert attention_ms(heads, call, flash=flash, n_threads=2, kv_cache_type=kv_cache_type) > 0


@pytest.mark.parametrize("n_threads", [1, 512])
@pytest.mark.parametrize("flash", [True, False])
def test_any_number_of_threads_has_the_memory_it_needs(n_threads: int, flash: bool) -> None:
    call = Call(128, 256, 1)
    assert attention_ms(HEADS[0], call, flash=flash, n_threads=n_threads, kv_cache_type="f16") > 0


def count(measured: list[float]) -> Callable[[Callable[[], float]], float]:
    def call(measure: Callable[[], float]) -> float:
        measured.append(measure())
        return measured[-1]

    return call


@pytest.mark.parametrize(("shape", "measures"), [("llama", True), ("gemma3", True), ("jamba", True), ("mamba", False)])
def test_only_a_model_that_attends_is_measured(toys: dict[str, Path], shape: str, measures: bool) -> None:
    measured = list[float]()
    info = gguf.read(toys[shape])
    faster = plain_is_faster(info, n_threads=1, kv_cache_type="f16", call=count(measured))
    assert bool(measured) is measures
    assert measures or not faster


@pytest.mark.parametrize(
    "changes", [{"head_count": 0}, {"head_count": 5}, {"head_count_kv": ()}, {"key_length": 0}, {"value_length": 2**31}]
)
def test_heads_that_no_model_has_are_not_measured(toys: dict[str, Path], changes: dict[str, Any]) -> None:
    assert Heads.of(info := gguf.read(toys["llama"])) == Heads(4, 2, 16, 16)
    assert Heads.of(replace(info, **changes)) is None


class Remembered(Facts):
    """In memory."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, str], Any] = {}

    def get(self, digest: str, name: str, kind: type[T]) -> T | None:
        return self.values.get((digest, name))

    def keep(self, digest: str, name: str, value: object) -> None:
        self.values[digest, name] = value


def prefers_plain_attention(path: Path, facts: Facts, flash_attention: str = "auto") -> bool:
    settings = Settings(num_thread=1, flash_attention=flash_attention)
    return LlamaEngines(settings, facts).prefers_plain_attention(record(path), LoadOptions())


def test_what_a_machine_prefers_is_measured_once(toys: dict[str, Path]) -> None:
    facts = Remembered()
    measured = prefers_plain_attention(toys["llama"], facts)
    assert list(facts.values.values()) == [measured]
    facts.values = dict.fromkeys(facts.values, not measured)
    assert prefers_plain_attention(toys["llama"], facts) is not measured


@pytest.mark.parametrize("setting", ["on", "off"])
def test_a_setting_leaves_nothing_to_measure(toys: dict[str, Path], setting: str) -> None:
    facts = Remembered()
    assert not prefers_plain_attention(toys["llama"], facts, setting)
    assert facts.values == {}


def test_every_context_of_an_engine_attends_as_planned_where_memory_is_there(toys: dict[str, Path]) -> None:
    plan = MemoryPlan(N_CTX, SLOTS, 0, plain_attention=True)
    engine = LlamaEngines(Settings(num_thread=1))(record(toys["llama"]), LoadOptions(), plan)
    flash_bytes, plain_bytes = (engine._large_lane_bytes(2048, attention) for attention in ("auto", "off"))
    engine.reserve(1024, available_bytes=10**9)
    with pytest.raises(OutOfMemory):
        engine.reserve(2048, available_bytes=flash_bytes - 1)
    engine.reserve(2048, available_bytes=plain_bytes - 1)
    assert [lane.shape.flash_attention for lane in engine._lanes] == ["off", "off", "auto"]
    assert [lane._scheduler.prompt_cost.tile for lane in engine._lanes] == [1, 1, FLASH_TILE]
    for num_ctx in (N_CTX, 1024, 2048):
        final = last(engine, ask(1, max_tokens=None, num_ctx=num_ctx))
        assert final.usage is not None
        assert final.usage.prompt_tokens + final.usage.completion_tokens == num_ctx
    engine.close()
