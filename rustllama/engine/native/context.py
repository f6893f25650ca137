"""A llama.cpp context: slots of tokens, the calls that compute them, and their states."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from rustllama.engine.decode_cost import DRAFT_ROWS
from rustllama.engine.native.library import forget_words, words
from rustllama.engine.native.model import Model
from rustllama.engine.native.sampler import Sampler
from rustllama.engine.states import EXACT_CHUNK
from rustllama.errors import InternalError, OutOfMemory

FLASH_ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
KV_CACHE = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}


class Aborted(Exception):
    """A prompt call was ended by `Context.abort`; its sequence has to be cleared."""


class Context:
    """`n_slots` sequences of `n_ctx` tokens each, every one with a KV stream of its own (llama.cpp: kv_unified off)."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_slots: int,
        n_batch: int,
        n_threads: int,
        flash_attention: str = "auto",
        kv_cache_type: str = "f16",
    ) -> None:
        """Allocates and clears the KV cache. Raises OutOfMemory."""
        self.model = model
        self._abort = ctypes.create_string_buffer(2)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * n_slots
        params.n_seq_max = n_slots
        params.n_batch = params.n_ubatch = max(n_batch, n_slots, EXACT_CHUNK, DRAFT_ROWS)
        params.n_outputs_max = max(n_slots, DRAFT_ROWS)  # or llama.cpp reserves n_batch × n_vocab floats
        params.n_threads = params.n_threads_batch = self._n_threads = n_threads
        params.flash_attn_type = FLASH_ATTENTION[flash_attention]
        params.type_k = params.type_v = KV_CACHE[kv_cache_type]
        params.kv_unified = False
        params.no_perf = True
        forget_words()
        self._context = llama_cpp.llama_init_from_model(model._model, params)
        if not self._context:
            raise OutOfMemory(f"llama.cpp could not make a context of {n_slots} × {n_ctx} tokens: {words()}.")
        # libc's strlen as the callback: an empty buffer is "go on", and no Python runs inside the computation
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
        llama_cpp.llama_set_abort_callback(self._context, strlen, ctypes.cast(self._abort, ctypes.c_void_p))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.can_shift = bool(llama_cpp.llama_memory_can_shift(self._memory))
        self.n_slots = n_slots
        self._rows = _Rows(int(params.n_batch))

    def use(self, n_threads: int) -> None:
        """Threads for the calls that follow."""
        if n_threads != self._n_threads:
            llama_cpp.llama_set_n_threads(self._context, n_threads, n_threads)
            self._n_threads = n_threads

    def decode(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], outputs: Any) -> None:
        """Computes one row for each token; rows stand in the order of slots, and of positions within a slot.

        `outputs` (booleans, or one for all) tells which rows give logits. Raises Aborted and InternalError.
        """
        status = llama_cpp.llama_decode(self._context, self._rows.fill(tokens, positions, slots, outputs))
        if status == 2:
            raise Aborted
        if status:
            raise InternalError(f"llama_decode failed with status {status}: {words()}.")

    def sample(self, sampler: Sampler, row: int) -> int:
        """Draws from the logits of a row of the last call that asked for them, and accepts the token."""
        if sampler.is_greedy:
            return int(self._row(row).argmax())
        return int(llama_cpp.llama_sampler_sample(sampler.handle, self._context, row))

    def logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A copy of the row's logits, (n_vocab,) float32."""
        return self._row(row).copy()

    def _row(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Valid until the next call."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,))

    def abort(self) -> None:
        """Ends the call that runs, from any thread; only for a prompt call that carries one sequence alone."""
        self._abort[0] = b"!"

    def rearm(self) -> None:
        """Makes calls possible again after `abort`."""
        self._abort[0] = b"\0"

    def clear(self, slot: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def cut(self, slot: int, count: int) -> None:
        """Leaves the first `count` tokens; only where states may be cut (see `prefix_store.Cuts`)."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, count, -1)

    def drop(self, slot: int, start: int, end: int) -> None:
        """Forgets the positions from `start` to `end`; those behind close the gap.

        Their keys are rotated by the next `decode`: nothing may be saved before it. Only where `can_shift`.
        """
        llama_cpp.llama_memory_seq_rm(self._memory, slot, start, end)
        llama_cpp.llama_memory_seq_add(self._memory, slot, end, -1, start - end)

    def move(self, source: int, target: int) -> None:
        """The state of `source` goes to the empty slot `target`."""
        self._load(target, self.save(source))
        self.clear(source)

    def swap(self, one: int, other: int) -> None:
        first, second = self.save(one), self.save(other)
        self.clear(one)
        self.clear(other)
        self._load(one, second)
        self._load(other, first)

    def save(self, slot: int) -> memoryview:
        """The slot's state (llama_state_seq_get_data); only a context of the same shape can read it."""
        size = llama_cpp.llama_state_seq_get_size(self._context, slot)
        data = np.empty(size, np.uint8)
        written = llama_cpp.llama_state_seq_get_data(self._context, _pointer(data, ctypes.c_uint8), size, slot)
        return data.data[:written]

    def restore(self, slot: int, state: memoryview, count: int) -> bool:
        """Gives the empty slot the first `count` tokens of a saved state; False when it has others then."""
        if not self._read(slot, state):
            return False
        if self.bounds(slot)[1] >= count:
            llama_cpp.llama_memory_seq_rm(self._memory, slot, count, -1)
        return self.bounds(slot)[1] == count - 1

    def bounds(self, slot: int) -> tuple[int, int]:
        """First and last position that the slot holds; (-1, -1) when it is empty."""
        return (
            llama_cpp.llama_memory_seq_pos_min(self._memory, slot),
            llama_cpp.llama_memory_seq_pos_max(self._memory, slot),
        )

    def _load(self, slot: int, state: memoryview) -> None:
        if not self._read(slot, state):
            raise InternalError(f"llama.cpp refused a sequence's state: {words()}.")

    def _read(self, slot: int, state: memoryview) -> bool:
        data = np.frombuffer(state, np.uint8)
        return bool(llama_cpp.llama_state_seq_set_data(self._context, _pointer(data, ctypes.c_uint8), len(data), slot))

    def close(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None


class _Rows:
    """The arrays that a llama_batch points into, allocated once; filling them costs microseconds."""

    def __init__(self, n_batch: int) -> None:
        self._tokens = np.zeros(n_batch, np.int32)
        self._positions = np.zeros(n_batch, np.int32)
        self._slots = np.zeros(n_batch, np.int32)
        self._slot_counts = np.ones(n_batch, np.int32)
        self._outputs = np.zeros(n_batch, np.int8)
        self._slot_pointers = self._slots.ctypes.data + 4 * np.arange(n_batch, dtype=np.uintp)
        self._batch = llama_cpp.llama_batch()
        self._batch.token = _pointer(self._tokens, ctypes.c_int32)
        self._batch.pos = _pointer(self._positions, ctypes.c_int32)
        self._batch.n_seq_id = _pointer(self._slot_counts, ctypes.c_int32)
        self._batch.seq_id = _pointer(self._slot_pointers, ctypes.POINTER(ctypes.c_int32))
        self._batch.logits = _pointer(self._outputs, ctypes.c_int8)

    def fill(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], outputs: Any) -> Any:
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._slots[:count] = slots
        self._outputs[:count] = outputs
        self._batch.n_tokens = count
        return self._batch


def _pointer(array: np.ndarray[Any, Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
