"""What ggml itself offers and llama-cpp-python does not: its functions, declared, and the order that weights may have.

Takes the loaded library, so that nothing else of llama.cpp is needed for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

AMX = b"AMX"  # the order for Intel's unit for products of matrices
RIGHT = b"right"  # what a process says that used it
_CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_EXTRA_BUFTS = b"ggml_backend_dev_get_extra_bufts"
_POINTER = ctypes.c_void_p


class Init(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


Signatures = Mapping[str, tuple[Any, ...]]  # of functions: the result, then the arguments

GRAPHS: Signatures = {  # ggml.h
    "ggml_init": (_POINTER, Init),
    "ggml_free": (None, _POINTER),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph": (_POINTER, _POINTER),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
}
_ORDERS: Signatures = {  # ggml-backend.h
    "ggml_backend_dev_by_type": (_POINTER, ctypes.c_int),
    "ggml_backend_dev_backend_reg": (_POINTER, _POINTER),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_buft_name": (ctypes.c_char_p, _POINTER),
}


def declare(ggml: ctypes.CDLL, signatures: Signatures) -> bool:
    """Whether the library exports them all: one that chooses among several CPU backends as it starts does not."""
    if not all(hasattr(ggml, name) for name in signatures):
        return False
    for name, (result, *arguments) in signatures.items():
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    return True


class Orders:
    """In which weights may lie for the CPU, beside that of the file: llama.cpp's own list, the one it prefers first.

    llama.cpp looks into it whenever it loads a model (`make_cpu_buft_list`).
    """

    def __init__(self, ggml: ctypes.CDLL) -> None:
        self._ggml = ggml
        self._list: Any = None
        self.cpu: int | None = None
        if declare(ggml, _ORDERS):
            self.cpu = ggml.ggml_backend_dev_by_type(_CPU_DEVICE)
        if self.cpu:
            registry = ggml.ggml_backend_dev_backend_reg(self.cpu)
            address = ggml.ggml_backend_reg_get_proc_address(registry, _EXTRA_BUFTS)
            if address:
                self._list = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(self.cpu)

    @property
    def names(self) -> list[bytes]:
        return [self._ggml.ggml_backend_buft_name(order) for order in self._all()]

    def __getitem__(self, name: bytes) -> int:
        """A `ggml_backend_buffer_type_t`."""
        return self._all()[self.names.index(name)]

    def remove(self, name: bytes) -> None:
        """No model that is loaded from now on has this one."""
        place, left = self.names.index(name), self._all()
        del left[place]
        for i, order in enumerate([*left, None]):  # a null ends it
            self._list[i] = order

    def _all(self) -> list[int]:
        found = list[int]()
        while self._list is not None and self._list[len(found)]:
            found.append(self._list[len(found)])
        return found
