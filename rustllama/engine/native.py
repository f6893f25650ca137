"""The only door to llama.cpp: weights with their vocabulary, contexts with their slots, sampler chains.

Not one of these functions may be called in the hub, and a Context only by one thread at a time.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _ggml

from rustllama.core import ModelInfo
from rustllama.engine.costs import DRAFT_ROWS
from rustllama.engine.sampling import Stage
from rustllama.engine.states import EXACT_CHUNK
from rustllama.errors import BadModelFile, InternalError, OutOfMemory

FLASH_ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
KV_CACHE = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}
_GPU_DEVICE = 1  # GGML_BACKEND_DEVICE_TYPE_GPU
_GPU_WEIGHTS_PERCENT = 80  # of a GPU's free memory; the rest is for the KV cache and buffers
_WARNING_LEVEL = 3  # enum ggml_log_level: 3 is WARN, 4 is ERROR
_log = logging.getLogger("rustllama.native")
_last_words: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if level in (_WARNING_LEVEL, _WARNING_LEVEL + 1) and line:
        _last_words.append(line)
        _log.debug("%s", line)


llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def _build() -> str:
    commit = _ggml.libggml.ggml_commit
    commit.restype = ctypes.c_char_p
    return f"{llama_cpp.__version__} {commit().decode()}"


BUILD = _build()  # which llama.cpp this is: no other one reads the states that it saves


class Aborted(Exception):
    """A prompt call was ended by `Context.abort`; its sequence has to be cleared."""


class Model:
    """The weights of a GGUF and its vocabulary. Tokenizing may run beside a context's calls: it only reads."""

    def __init__(
        self, path: str, *, num_gpu: int = 0, use_mmap: bool = True, tell: Callable[[float], None] | None = None
    ) -> None:
        """Raises BadModelFile with llama.cpp's own words. `num_gpu` -1 is every layer.

        `tell` gets the share of the weights that is loaded, from 0 to 1, in this thread; it must not raise.
        """
        params = llama_cpp.llama_model_default_params()
        if tell is not None:
            params.progress_callback = _progress_callback(tell)
        params.n_gpu_layers = num_gpu
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if use_mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        _last_words.clear()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise BadModelFile(f"llama.cpp could not load '{path}': {_words()}.")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._pieces: dict[int, bytes | None] = {}

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """`parse_special` lets text that spells a special token become it; no BOS is added, see `leading_bos`."""
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        while True:
            tokens = (llama_cpp.llama_token * size)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, size, False, parse_special)
            if count >= 0:
                return list(tokens[:count])
            size = -count

    def piece(self, token: int) -> bytes:
        """The bytes of a token as they appear in an answer: none for a control token."""
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def answer_piece(self, token: int) -> bytes | None:
        """`piece`, remembered; None for a token that ends the generation."""
        try:
            return self._pieces[token]
        except KeyError:
            self._pieces[token] = found = None if self.is_eog(token) else self.piece(token)
            return found

    def is_eog(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    @property
    def leading_bos(self) -> int | None:
        """The BOS token, where the vocabulary wants every prompt to begin with it."""
        return llama_cpp.llama_vocab_bos(self._vocab) if llama_cpp.llama_vocab_get_add_bos(self._vocab) else None

    @property
    def bos_token(self) -> str:
        return self._text(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos_token(self) -> str:
        return self._text(llama_cpp.llama_vocab_eos(self._vocab))

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        return str(llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"))

    def close(self) -> None:
        """All contexts are closed before."""
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None


class Sampler:
    """A chain of llama.cpp's samplers with the state of one sequence."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.handle = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for stage in stages:
            init = getattr(llama_cpp, f"llama_sampler_init_{stage.name}")
            llama_cpp.llama_sampler_chain_add(self.handle, init(*stage.arguments))

    def accept(self, tokens: Iterable[int]) -> None:
        """Shows the prompt's tokens to the penalties."""
        for token in tokens:
            llama_cpp.llama_sampler_accept(self.handle, token)

    def close(self) -> None:
        if self.handle:
            llama_cpp.llama_sampler_free(self.handle)
            self.handle = None


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
        self._abort = ctypes.create_string_buffer(2)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * n_slots
        params.n_seq_max = n_slots
        params.n_batch = params.n_ubatch = max(n_batch, n_slots, EXACT_CHUNK, DRAFT_ROWS)
        params.n_outputs_max = max(n_slots, DRAFT_ROWS)  # or llama.cpp reserves n_batch × n_vocab floats
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = FLASH_ATTENTION[flash_attention]
        params.type_k = params.type_v = KV_CACHE[kv_cache_type]
        params.kv_unified = False
        params.no_perf = True
        _last_words.clear()
        self._context = llama_cpp.llama_init_from_model(model._model, params)
        if not self._context:
            raise OutOfMemory(f"llama.cpp could not make a context of {n_slots} × {n_ctx} tokens: {_words()}.")
        # libc's strlen as the callback: an empty buffer is "go on", and no Python runs inside the computation
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
        llama_cpp.llama_set_abort_callback(self._context, strlen, ctypes.cast(self._abort, ctypes.c_void_p))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.can_shift = bool(llama_cpp.llama_memory_can_shift(self._memory))
        self.n_slots = n_slots
        self.n_vocab = model.n_vocab
        self._rows = _Rows(int(params.n_batch))

    def decode(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], outputs: Any) -> None:
        """Computes one row for each token; rows stand in the order of slots, and of positions within a slot.

        `outputs` (booleans, or one for all) tells which rows give logits. Raises Aborted and InternalError.
        """
        status = llama_cpp.llama_decode(self._context, self._rows.fill(tokens, positions, slots, outputs))
        if status == 2:
            raise Aborted
        if status:
            raise InternalError(f"llama_decode failed with status {status}: {_words()}.")

    def sample(self, sampler: Sampler, row: int) -> int:
        """Draws from the logits of a row of the last call that asked for them, and accepts the token."""
        return int(llama_cpp.llama_sampler_sample(sampler.handle, self._context, row))

    def logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A copy of the row's logits, (n_vocab,) float32."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).copy()

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
            raise InternalError(f"llama.cpp refused a sequence's state: {_words()}.")

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


def _progress_callback(tell: Callable[[float], None]) -> Any:
    def callback(share: float, _: object) -> bool:
        tell(share)
        return True  # False would end the load

    return llama_cpp.llama_progress_callback(callback)


def _words() -> str:
    """llama.cpp's last words, for a message: where several lines tell of one failure, the one that has the reason."""
    reasons = [line for line in _last_words if "error" in line.lower()] or list(_last_words)
    return reasons[0].strip().rstrip(".") if reasons else "no reason was given"


def has_gpu() -> bool:
    """Whether llama.cpp was built with a GPU backend and found a device."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def gpu_layers(info: ModelInfo, wanted: int) -> int:
    """How many layers go to the GPU: those wanted; for -1 as many as its free memory holds, with room for the cache."""
    if not has_gpu():
        return 0
    if wanted >= 0:
        return wanted
    layers = info.block_count + 1  # the output head counts as one
    return min(layers, _gpu_free_bytes() * _GPU_WEIGHTS_PERCENT // 100 * layers // max(1, info.size_bytes))


def _gpu_free_bytes() -> int:
    """Free memory of all devices with memory of their own (ggml_backend_dev_memory)."""
    ggml = _ggml.libggml
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    total = 0
    for index in range(ggml.ggml_backend_dev_count()):
        device = ctypes.c_void_p(ggml.ggml_backend_dev_get(index))
        if ggml.ggml_backend_dev_type(device) == _GPU_DEVICE:
            free, capacity = ctypes.c_size_t(), ctypes.c_size_t()
            ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(capacity))
            total += free.value
    return total
