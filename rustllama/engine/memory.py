"""How many slots of how many tokens a model gets from the memory there is. Pure arithmetic on the header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rustllama.core import MemoryPlan, ModelInfo
from rustllama.engine.decode_cost import DRAFT_ROWS
from rustllama.engine.machine import free_memory_bytes
from rustllama.errors import OutOfMemory
from rustllama.settings import Settings

SMALLEST_CTX = 2048  # tokens; a smaller context is not worth a load
MOST_SLOTS = 16
_KV_BYTES = {"f16": 2, "f32": 4}  # of a number
_CELLS = 256  # llama.cpp pads a stream's cells to this
_COMFORT_BYTES = 1024**3  # of KV cache: clearing more makes the first answer late
_GIB = 1024**3


def plan(
    info: ModelInfo,
    settings: Settings,
    available_bytes: int,
    *,
    squeeze: bool,
    slots_before: Mapping[int, int] | None = None,
    plain_attention: bool = False,
) -> MemoryPlan | None:
    """The layout of a model in that much memory, or None; `squeeze` allows contexts down to SMALLEST_CTX.

    `slots_before`: by the tokens of a slot, how many there were when it was loaded before. A saved state is refused by
    a context of another number, so that this one is kept where it fits, unless twice as many would be there now.
    `plain_attention` is wanted, but not at the price of a slot or of a shorter context.
    """
    flash = _plan(info, settings, available_bytes, squeeze, slots_before or {})
    if flash is None or not plain_attention:
        return flash
    without = replace(settings, flash_attention="off")
    plain = _plan(info, without, available_bytes, squeeze, slots_before or {})
    if plain is None or (plain.n_ctx, plain.n_slots) != (flash.n_ctx, flash.n_slots):
        return flash
    return replace(plain, plain_attention=True)


def _plan(
    info: ModelInfo, settings: Settings, available_bytes: int, squeeze: bool, slots_before: Mapping[int, int]
) -> MemoryPlan | None:
    usual = _usual_ctx(info, settings)
    smallest = min(usual, SMALLEST_CTX) if squeeze else usual
    n_ctx = usual
    while _needed_bytes(info, settings, n_ctx) > available_bytes and n_ctx > smallest:
        n_ctx = max(smallest, padded(n_ctx // 2))
    needed = _needed_bytes(info, settings, n_ctx)
    if needed > available_bytes:
        return None
    warnings = () if n_ctx == usual else (f"memory is short: the context is {n_ctx} tokens instead of {usual}",)
    one = MemoryPlan(n_ctx, 1, needed, warnings)
    return _with_slots(one, info, settings, available_bytes, slots_before.get(n_ctx))


def mapped_plan(info: ModelInfo, settings: Settings, available_bytes: int) -> MemoryPlan:
    """The smallest layout, with mapped weights beyond the limit: the system pages them.

    Raises OutOfMemory, saying how much is needed and how much there is.
    """
    n_ctx = min(_usual_ctx(info, settings), SMALLEST_CTX)
    needed = _needed_bytes(info, settings, n_ctx)
    if not settings.use_mmap or needed - info.size_bytes > available_bytes:
        raise OutOfMemory(
            f"the model needs {gib(needed)} with a context of {n_ctx} tokens, and {gib(available_bytes)} are free: "
            "take a smaller one, stop others, or raise RUSTLLAMA_MEMORY_LIMIT."
        )
    warning = (
        f"the model needs {gib(needed)} and {gib(available_bytes)} are free: "
        "its weights are read from disk again and again, which is slow"
    )
    return MemoryPlan(n_ctx, 1, needed, (warning,))


def refuse_what_never_fits(info: ModelInfo, settings: Settings, all_bytes: int) -> None:
    """Raises OutOfMemory where not even all memory is enough: nobody has to wait or to leave for it."""
    if plan(info, settings, all_bytes, squeeze=True) is None:
        mapped_plan(info, settings, all_bytes)


def large_lane_bytes(info: ModelInfo, settings: Settings, n_ctx: int) -> int:
    """What one further slot of that many tokens takes, in a context of its own."""
    return _lane_bytes(info, settings, n_ctx, 1)


def prompt_cache_bytes(settings: Settings) -> int:
    """Host memory for computed prompts."""
    if settings.prompt_cache_memory is not None:
        return settings.prompt_cache_memory
    return min(_GIB, (settings.memory_limit or free_memory_bytes()) // 10)


def token_bytes(info: ModelInfo, settings: Settings) -> int:
    """Of the KV cache, for each token of a sequence."""
    return sum(info.head_count_kv) * (info.key_length + info.value_length) * _KV_BYTES[settings.kv_cache_type]


def padded(n_ctx: int) -> int:
    return max(1, -(-n_ctx // _CELLS)) * _CELLS


def gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB"


def told(plan: MemoryPlan) -> str:
    """For the log; its warnings go to the client."""
    attention = ", without flash attention" if plan.plain_attention else ""
    return f"{plan.n_slots} x {plan.n_ctx} tokens, {gib(plan.size_bytes)}{attention}"


def _usual_ctx(info: ModelInfo, settings: Settings) -> int:
    return padded(min(settings.num_ctx, info.context_length or settings.num_ctx))


def _with_slots(
    one: MemoryPlan, info: ModelInfo, settings: Settings, available_bytes: int, before: int | None
) -> MemoryPlan:
    spare = available_bytes - one.size_bytes
    each = _slot_bytes(info, settings, one.n_ctx)
    if settings.slots is None:
        most = min(MOST_SLOTS, 1 + min(spare // 2, max(0, _COMFORT_BYTES - each)) // max(1, each))
        if before is not None and most < 2 * before and before <= min(MOST_SLOTS, 1 + spare // max(1, each)):
            most = before
    else:
        most = min(settings.slots, 1 + spare // max(1, each))
    size = info.size_bytes + _lane_bytes(info, settings, one.n_ctx, most)
    while most > 1 and size > available_bytes:
        most -= 1
        size = info.size_bytes + _lane_bytes(info, settings, one.n_ctx, most)
    warnings = one.warnings
    if settings.slots is not None and most < settings.slots:
        warnings += (f"memory is short: {most} slots instead of {settings.slots}",)
    return replace(one, n_slots=most, size_bytes=size, warnings=warnings)


def _needed_bytes(info: ModelInfo, settings: Settings, n_ctx: int) -> int:
    return info.size_bytes + _lane_bytes(info, settings, n_ctx, 1)


def _lane_bytes(info: ModelInfo, settings: Settings, n_ctx: int, n_slots: int) -> int:
    buffers = _buffer_bytes(info, settings.num_batch, n_slots) + _score_bytes(info, settings, n_ctx)
    return n_slots * _slot_bytes(info, settings, n_ctx) + buffers


def _slot_bytes(info: ModelInfo, settings: Settings, n_ctx: int) -> int:
    """KV cache and recurrent state of a sequence; sliding-window layers are counted as full ones."""
    return n_ctx * token_bytes(info, settings) + info.recurrent_state_bytes


def _buffer_bytes(info: ModelInfo, n_batch: int, n_slots: int) -> int:
    """llama.cpp's compute buffer, estimated: about 24 activations of the width for each row, and the logits."""
    rows = max(n_slots, DRAFT_ROWS)
    return 4 * (24 * n_batch * info.embedding_length + 2 * rows * info.vocabulary_size)


def _score_bytes(info: ModelInfo, settings: Settings, n_ctx: int) -> int:
    """Without flash attention: what each head makes of each cell, for each row of a call."""
    return 4 * settings.num_batch * n_ctx * info.head_count if settings.flash_attention == "off" else 0
