"""What is installed of llama.cpp: whether it can be loaded at all, for what it was built, and what it leaves unused.

It is loaded in a process of its own: a build for another processor dies of an illegal instruction.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from rustllama.doctor.finding import Finding, hint, ok, wrong

_PACKAGE = "llama-cpp-python"
_CHILD = (sys.executable, "-c", "from rustllama.doctor.library import tell; tell()")
_TIMEOUT_S = 2.0
_REBUILD = f"pip install --force-reinstall --no-cache-dir {_PACKAGE}"
_FEATURES = {"AVX": "avx", "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "AVX512": "avx512f"}  # of Linux's cpuinfo
_AMX = "AMX_INT8"
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA = Path("/proc/driver/nvidia/version")


class Library(msgspec.Struct, frozen=True):
    version: str
    features: str  # as llama_print_system_info has them
    has_gpu: bool
    left_amx: bool = False  # it has code for AMX that does not work


def tell() -> None:
    """In the child: prints a Library."""
    from rustllama.engine.native import library

    found = Library(library.VERSION, library.system_info(), library.has_gpu(), library.LEFT_AMX)
    sys.stdout.write(msgspec.json.encode(found).decode())


def examine(child: Sequence[str] = _CHILD) -> Iterator[Finding]:
    try:
        done = subprocess.run(child, capture_output=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
        found = msgspec.json.decode(done.stdout, type=Library)
    except subprocess.TimeoutExpired:
        yield hint("llama.cpp", f"it was not loaded within {_TIMEOUT_S:g} s: the machine is busy, or its disk slow.")
    except msgspec.DecodeError:
        yield wrong("llama.cpp", f"{_PACKAGE} cannot be loaded ({_reason(done)}): `{_REBUILD}` builds it anew.")
    else:
        yield from described(found, _flags(), has_nvidia=_NVIDIA.exists(), oldest=_oldest())


def described(found: Library, flags: frozenset[str], *, has_nvidia: bool, oldest: str = "") -> Iterator[Finding]:
    """`flags` are what the processor can do, `oldest` is the version that is wanted at least."""
    if oldest and _numbers(found.version) < _numbers(oldest):
        yield wrong(
            "llama.cpp", f"{_PACKAGE} {found.version} is older than {oldest}: `pip install -U {_PACKAGE}` updates it."
        )
    used = [name for name in re.findall(r"(\w+) = 1", found.features) if not (found.left_amx and name == _AMX)]
    yield ok(
        "llama.cpp",
        f"{_PACKAGE} {found.version}, {'built for a GPU that is here' if found.has_gpu else 'for the CPU alone'}; it "
        f"uses {', '.join(used)}.",
        version=found.version,
        gpu=found.has_gpu,
        features=used,
    )
    unused = [name for name, flag in _FEATURES.items() if flag in flags and name not in used]
    if unused:
        yield hint(
            "llama.cpp",
            f"it was built without {', '.join(unused)}, which this processor has, and is slower for it: `{_REBUILD}`.",
        )
    if found.left_amx:
        yield hint(
            "llama.cpp",
            "its code for AMX, which this processor has, does not work, and prompts are read more slowly without: the "
            f"compiler was too old for it, as GCC 12.2 is. With a newer one, `{_REBUILD}` builds it anew.",
        )
    if has_nvidia and not found.has_gpu:
        yield hint(
            "llama.cpp", f"there is an NVIDIA GPU that it cannot use: `CMAKE_ARGS=-DGGML_CUDA=on {_REBUILD}` builds it."
        )


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"its process died of {signal.Signals(-done.returncode).name}, as when it was built for another one"
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason was given"]
    return lines[-1][:200].rstrip(".")


def _flags() -> frozenset[str]:
    try:
        found = re.search(r"^flags\s*:(.*)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()


def _oldest() -> str:
    """The version that this package asks for; "" where it is not installed as a package."""
    try:
        wanted = " ".join(metadata.requires("rustllama") or ())
    except metadata.PackageNotFoundError:
        return ""
    found = re.search(rf"{_PACKAGE}\s*\(?[^;,\s]*?>=\s*([\d.]+)", wanted)
    return found[1] if found else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
