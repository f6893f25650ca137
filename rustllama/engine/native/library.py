"""The library itself: which build it is, what works of it here, what it said last, and the GPUs that it found."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable

import llama_cpp
from llama_cpp import _ggml

from rustllama.core import ModelInfo
from rustllama.engine.ggml import AMX, RIGHT, Orders

_GPU_DEVICE = 1  # GGML_BACKEND_DEVICE_TYPE_GPU
_GPU_WEIGHTS_PERCENT = 80  # of a GPU's free memory; the rest is for the KV cache and buffers
_WARNING_LEVEL = 3  # enum ggml_log_level: 3 is WARN, 4 is ERROR
_AMX_CHILD = (sys.executable, "-m", "rustllama.amx_child")
_AMX_TIMEOUT_S = 10.0  # it takes some hundredths of a second
_log = logging.getLogger("rustllama.native")
_last_words: deque[str] = deque(maxlen=8)
_listeners: list[Callable[[str], None]] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if level in (_WARNING_LEVEL, _WARNING_LEVEL + 1) and line:
        _last_words.append(line)
        _log.debug("%s", line)
        _tell(line)


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
def _keep_abort(text: bytes) -> None:
    """In whatever thread; the process ends when it returns (ggml_abort)."""
    os.write(2, text + b"\n")  # as llama.cpp does where nobody listens
    _tell(text.decode("utf-8", "replace"))


def _tell(line: str) -> None:
    for listener in _listeners:
        listener(line)


llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def leave_amx_where_broken(orders: Orders, works: Callable[[], bool]) -> bool:
    """True where llama.cpp would have used AMX and does without from now on, as its code for it does not work.

    To compilers like GCC 12.2, `_tile_loadconfig` does not tell what it reads, so that they leave out most of what
    llama.cpp writes there (`ggml_tile_config_init` in mmq.cpp), and the first prompt dies of an illegal instruction.
    Nothing tells such a build from a good one but to use it, in a process of its own.
    """
    if AMX not in orders.names or works():
        return False
    orders.remove(AMX)
    return True


def amx_works() -> bool:
    """Whether a process that multiplies by it lives, and gets the right product."""
    command = [*_AMX_CHILD, str(_ggml.libggml._name)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_AMX_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False  # slower is better than dead
    return done.stdout == RIGHT


LEFT_AMX = leave_amx_where_broken(Orders(_ggml.libggml), amx_works)


def _build() -> str:
    commit = _ggml.libggml.ggml_commit
    commit.restype = ctypes.c_char_p
    return f"{llama_cpp.__version__} {commit().decode()}{' without AMX' if LEFT_AMX else ''}"


BUILD = _build()  # which llama.cpp this is: no other one reads the states that it saves
VERSION = str(llama_cpp.__version__)  # of llama-cpp-python


def system_info() -> str:
    """What llama.cpp was built to use of the processor, like "AVX2 = 1 | FMA = 1"."""
    return str(llama_cpp.llama_print_system_info().decode("utf-8", "replace"))


def listen(listener: Callable[[str], None]) -> None:
    """From now on this one hears what llama.cpp complains of, in any thread; it may be the last it does."""
    _listeners[:] = [listener]
    _ggml.libggml.ggml_set_abort_callback(_keep_abort)


def forget_words() -> None:
    """Before a call whose failure is to be explained."""
    _last_words.clear()


def words() -> str:
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
