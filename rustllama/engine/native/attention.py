"""What attention costs on this machine in either of llama.cpp's two ways: its operations alone, without a model."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable

import llama_cpp
from llama_cpp import _ggml

from rustllama.core import ModelInfo
from rustllama.engine.attention import Call, Heads, prefers_plain
from rustllama.engine.ggml import GRAPHS, Init, Signatures, declare
from rustllama.engine.native.context import KV_CACHE

_F32, _F16 = llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_F16
_PRECISE = 10  # enum ggml_prec: GGML_PREC_F32, as llama.cpp asks for
_SPARE_BYTES = _SPARE_BYTES_OF_THREAD = 2 * 1024**2  # for what the operations need on their way
_EMPTY_CELLS = 128  # in the mean: a call sees a multiple of 256, and only flash attention skips those without a token
_TRIES = 3  # the first one touches the memory


_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_FUNCTIONS: Signatures = {  # ggml.h, ggml-cpu.h
    **GRAPHS,
    "ggml_new_tensor_4d": (_POINTER, _POINTER, _INT, _LONG, _LONG, _LONG, _LONG),
    "ggml_set_zero": (_POINTER, _POINTER),
    "ggml_permute": (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT),
    "ggml_soft_max_ext": (_POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _FLOAT),
    "ggml_flash_attn_ext": (_POINTER, *[_POINTER] * 5, _FLOAT, _FLOAT, _FLOAT),
    "ggml_flash_attn_ext_set_prec": (None, _POINTER, _INT),
    "ggml_graph_compute_with_ctx": (_INT, _POINTER, _POINTER, _INT),
}


_lib = _ggml.libggml
_CAN_MEASURE = declare(_lib, _FUNCTIONS)


def plain_is_faster(
    info: ModelInfo,
    *,
    n_threads: int,
    kv_cache_type: str,
    call: Callable[[Callable[[], float]], float] = lambda measure: measure(),
) -> bool:
    """Whether such a model is clearly faster without flash attention on these processors; False where it is not known.

    Blocks for some tenths of a second, in pieces for which nothing else should compute: `call` runs each of them.
    """
    heads = Heads.of(info) if _CAN_MEASURE else None
    if heads is None:
        return False
    of_heads = functools.partial(attention_ms, heads, n_threads=n_threads, kv_cache_type=kv_cache_type)
    return prefers_plain(lambda piece, flash: call(lambda: of_heads(piece, flash=flash)))


def attention_ms(heads: Heads, call: Call, *, flash: bool, n_threads: int, kv_cache_type: str) -> float:
    """The fastest of a few tries, for one layer."""
    graph = _Graph(heads, call, flash=flash, n_threads=n_threads, kv_cache_type=kv_cache_type)
    try:
        return min(graph.compute_ms() for _ in range(_TRIES))
    finally:
        graph.close()


class _Graph:
    """Queries of `call.rows` tokens in each stream on its past cells, as llama.cpp's `build_attn_mha` makes them.

    All numbers are zero: the time does not depend on them.
    """

    def __init__(self, heads: Heads, call: Call, *, flash: bool, n_threads: int, kv_cache_type: str) -> None:
        self._heads, self._kind, self._n_threads = heads, KV_CACHE[kv_cache_type], n_threads
        self._call = call if flash else call._replace(depth=call.depth + _EMPTY_CELLS)
        self._context = _lib.ggml_init(Init(self._size_bytes(), None, False))
        queries = self._by_head(_F32, heads.key_length, heads.queries, call.rows)
        keys = self._by_head(self._kind, heads.key_length, heads.keys, self._call.depth)
        self._graph = _lib.ggml_new_graph(self._context)
        result = self._flash(queries, keys) if flash else self._plain(queries, keys)
        _lib.ggml_build_forward_expand(self._graph, result)

    def compute_ms(self) -> float:
        started_ns = time.perf_counter_ns()
        _lib.ggml_graph_compute_with_ctx(self._context, self._graph, self._n_threads)
        return (time.perf_counter_ns() - started_ns) / 1e6

    def close(self) -> None:
        _lib.ggml_free(self._context)

    def _flash(self, queries: int, keys: int) -> int:
        values = self._by_head(self._kind, self._heads.value_length, self._heads.keys, self._call.depth)
        mask = self._zeros(_F16, self._call.depth, self._call.rows, 1)
        result: int = _lib.ggml_flash_attn_ext(self._context, queries, keys, values, mask, 1.0, 0.0, 0.0)
        _lib.ggml_flash_attn_ext_set_prec(result, _PRECISE)
        return result

    def _plain(self, queries: int, keys: int) -> int:
        """Scores, their softmax, and the sum of the values, which llama.cpp keeps transposed then."""
        values = self._zeros(self._kind, self._call.depth, self._heads.value_length, self._heads.keys)
        mask = self._zeros(_F32, self._call.depth, self._call.rows, 1)
        scores = _lib.ggml_mul_mat(self._context, keys, queries)
        weights = _lib.ggml_soft_max_ext(self._context, scores, mask, 1.0, 0.0)
        result: int = _lib.ggml_mul_mat(self._context, values, weights)
        return result

    def _by_head(self, kind: int, length: int, heads: int, count: int) -> int:
        """Zeros that lie as tokens, one after another with all its heads; seen head by head."""
        result: int = _lib.ggml_permute(self._context, self._zeros(kind, length, heads, count), 0, 2, 1, 3)
        return result

    def _zeros(self, kind: int, *shape: int) -> int:
        """For each stream."""
        tensor = _lib.ggml_new_tensor_4d(self._context, kind, *shape, self._call.streams)
        result: int = _lib.ggml_set_zero(tensor)
        return result

    def _size_bytes(self) -> int:
        """At least what is needed: ggml ends the process where its context is too small. Every number counts as four
        bytes, and the scores three times, as they are weighed and converted.
        """
        heads, call = self._heads, self._call
        lengths = heads.key_length + heads.value_length
        numbers = call.depth * heads.keys * lengths + call.rows * heads.queries * (2 * lengths + 3 * call.depth)
        spare_bytes = _SPARE_BYTES + self._n_threads * _SPARE_BYTES_OF_THREAD
        return spare_bytes + 4 * call.streams * (numbers + call.rows * call.depth)
