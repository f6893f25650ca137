"""How a model is laid out in the memory there is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rustllama.core import MemoryPlan, ModelInfo
from rustllama.engine import machine, memory
from rustllama.errors import OutOfMemory
from rustllama.settings import Settings

GIB = 1024**3
# 7B-shaped: 32 blocks of 8 KV heads, 128 KiB of cache for each token
LARGE = ModelInfo("llama", 7 * 10**9, "Q4_K_M", 4 * GIB, ("/m",), 32, 32768, 4096, 32, (8,) * 32, 128, 128, 128_000)
SMALL = replace(LARGE, size_bytes=GIB // 8, head_count_kv=(3,) * 30, key_length=64, value_length=64)


def plan(info: ModelInfo, gib: float, **settings: object) -> MemoryPlan:
    made = memory.plan(info, Settings(**settings), int(gib * GIB), squeeze=True)  # type: ignore[arg-type]
    assert made is not None
    return made


def test_a_big_model_on_a_laptop_gets_one_slot() -> None:
    made = plan(LARGE, 7)
    assert (made.n_ctx, made.n_slots, made.warnings) == (8192, 1, ())


def test_more_slots_come_from_spare_memory() -> None:
    assert 2 < plan(SMALL, 16).n_slots <= memory.MOST_SLOTS
    assert plan(SMALL, 0.7).n_slots < plan(SMALL, 16).n_slots


@pytest.mark.parametrize(("gib", "n_ctx"), [(5.6, 8192), (5.1, 4096), (4.6, 2048)])
def test_a_context_is_halved_until_it_fits(gib: float, n_ctx: int) -> None:
    made = plan(LARGE, gib)
    assert made.n_ctx == n_ctx
    assert bool(made.warnings) == (n_ctx != 8192)


def test_a_short_context_is_not_made_while_others_could_leave() -> None:
    assert memory.plan(LARGE, Settings(), int(5.1 * GIB), squeeze=False) is None


def test_slots_that_were_asked_for_are_made_or_the_lack_is_told() -> None:
    assert plan(SMALL, 16, slots=12).n_slots == 12
    few = plan(LARGE, 7.5, slots=12)
    assert few.n_slots < 12
    assert "slots instead of 12" in few.warnings[0]


@pytest.mark.parametrize(("before", "gib", "slots"), [(6, 16, 6), (6, 0.9, 2), (2, 0.8, 2), (2, 16, 5), (99, 16, 5)])
def test_the_slots_of_an_earlier_load_are_made_again_while_they_fit(before: int, gib: float, slots: int) -> None:
    made = memory.plan(SMALL, Settings(), int(gib * GIB), squeeze=True, slots_before={8192: before, 4096: 3})
    assert made is not None
    assert made.n_slots == slots


def test_what_plain_attention_takes_is_counted() -> None:
    plain, flash = (plan(LARGE, 24, slots=1, flash_attention=name).size_bytes for name in ("off", "auto"))
    assert plain - flash == 4 * 256 * 8192 * 32


@pytest.mark.parametrize(("gib", "plain"), [(7, True), (5.3, False), (5.15, False), (5.0, True)])
def test_plain_attention_is_not_bought_with_tokens_or_slots(gib: float, plain: bool) -> None:
    usual = memory.plan(LARGE, Settings(), int(gib * GIB), squeeze=True)
    made = memory.plan(LARGE, Settings(), int(gib * GIB), squeeze=True, plain_attention=True)
    assert usual is not None
    assert made is not None
    assert (made.n_ctx, made.n_slots, made.plain_attention) == (usual.n_ctx, usual.n_slots, plain)
    assert usual.size_bytes < made.size_bytes <= gib * GIB if plain else made == usual


def test_a_context_is_never_longer_than_what_was_trained() -> None:
    assert plan(replace(SMALL, context_length=1000), 16).n_ctx == 1024


def test_the_plan_stays_within_the_memory_it_was_given() -> None:
    for gib in (5, 6, 8, 12, 24):
        assert plan(LARGE, gib).size_bytes <= gib * GIB


def test_mapped_weights_may_exceed_the_limit_with_a_warning() -> None:
    assert "slow" in memory.mapped_plan(LARGE, Settings(), GIB).warnings[0]


def test_weights_that_must_be_read_whole_are_refused_with_both_figures() -> None:
    with pytest.raises(OutOfMemory, match=r"needs 4\.\d GiB .* and 1\.0 GiB are free"):
        memory.mapped_plan(LARGE, Settings(use_mmap=False), GIB)


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= machine.physical_cores() <= 1024
    assert machine.free_memory_bytes() > 64 * 1024**2


def test_the_log_tells_a_plan_in_words() -> None:
    assert memory.told(MemoryPlan(8192, 1, 5 * GIB)) == "1 x 8192 tokens, 5.0 GiB"
    told = memory.told(MemoryPlan(2048, 5, GIB // 2, ("the context is short.",), plain_attention=True))
    assert told == "5 x 2048 tokens, 0.5 GiB, without flash attention"
