"""The child process of `engine.native.library`: multiplies two matrices by AMX, and checks what comes out.

usage: python -m rustllama.amx_child GGML, the path of that library; it says RIGHT where the product is.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

from rustllama.engine.ggml import AMX, GRAPHS, RIGHT, Init, Orders, declare
from rustllama.rlimits import lower

_ROWS, _COLUMNS, _LENGTH = 32, 32, 64  # of a product that has tiles of all sizes
_BLOCK = 32  # numbers with one scale
_F32, _Q8_0 = 0, 8  # enum ggml_type
_MEMORY_BYTES = 1 << 20  # for what describes tensors and graphs
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_FUNCTIONS = {  # ggml-backend.h, ggml-alloc.h
    **GRAPHS,
    "ggml_new_tensor_2d": (_POINTER, _POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "ggml_backend_dev_init": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_dev_buffer_type": (_POINTER, _POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, ctypes.c_char_p, _SIZE, _SIZE),
    "ggml_backend_tensor_get": (None, _POINTER, ctypes.c_char_p, _SIZE, _SIZE),
    "ggml_backend_graph_compute": (ctypes.c_int, _POINTER, _POINTER),
}


def main(library: str) -> None:
    lower(resource.RLIMIT_CORE, 0)
    ggml = ctypes.CDLL(library)
    if product(ggml, Orders(ggml)[AMX]) == expected():
        os.write(1, RIGHT)


def _weight(row: int, place: int) -> int:
    return (7 * row + 3 * place) % 255 - 127


def _number(column: int, place: int) -> int:
    """The first of each block is the largest: so its scale is 1, and the product exact."""
    return 127 if place % _BLOCK == 0 else (5 * column + 11 * place) % 255 - 127


def expected() -> tuple[float, ...]:
    """Column by column, as ggml lays them."""
    places = range(_LENGTH)
    return tuple(
        float(sum(_weight(row, place) * _number(column, place) for place in places))
        for column in range(_COLUMNS)
        for row in range(_ROWS)
    )


def product(ggml: ctypes.CDLL, order: int | None = None) -> tuple[float, ...]:
    """The same by ggml, with weights in this order, a `ggml_backend_buffer_type_t`; None: in the file's."""
    declare(ggml, _FUNCTIONS)
    cpu = Orders(ggml).cpu
    usual = ggml.ggml_backend_dev_buffer_type(cpu)
    of_weights, of_numbers = (ggml.ggml_init(Init(_MEMORY_BYTES, None, True)) for _ in range(2))
    weights = ggml.ggml_new_tensor_2d(of_weights, _Q8_0, _LENGTH, _ROWS)
    numbers = ggml.ggml_new_tensor_2d(of_numbers, _F32, _LENGTH, _COLUMNS)
    product = ggml.ggml_mul_mat(of_numbers, weights, numbers)
    graph = ggml.ggml_new_graph(of_numbers)
    ggml.ggml_build_forward_expand(graph, product)
    ggml.ggml_backend_alloc_ctx_tensors_from_buft(of_weights, order or usual)
    ggml.ggml_backend_alloc_ctx_tensors_from_buft(of_numbers, usual)
    _set(ggml, weights, b"".join(_blocks(row) for row in range(_ROWS)))
    values = [_number(column, place) for column in range(_COLUMNS) for place in range(_LENGTH)]
    _set(ggml, numbers, struct.pack(f"{len(values)}f", *values))
    ggml.ggml_backend_graph_compute(ggml.ggml_backend_dev_init(cpu, None), graph)
    found = ctypes.create_string_buffer(4 * _ROWS * _COLUMNS)
    ggml.ggml_backend_tensor_get(product, found, 0, len(found))
    return struct.unpack(f"{_ROWS * _COLUMNS}f", found.raw)


def _blocks(row: int) -> bytes:
    """struct block_q8_0: a scale of 1 in half precision, and the numbers."""
    weights = [_weight(row, place) for place in range(_LENGTH)]
    return b"".join(struct.pack(f"e{_BLOCK}b", 1.0, *weights[i : i + _BLOCK]) for i in range(0, _LENGTH, _BLOCK))


def _set(ggml: ctypes.CDLL, tensor: int, data: bytes) -> None:
    ggml.ggml_backend_tensor_set(tensor, data, 0, len(data))


if __name__ == "__main__":
    main(*sys.argv[1:])
