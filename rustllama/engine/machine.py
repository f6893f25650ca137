"""What this machine, or the cgroup around this process, has free: memory and cores."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CPU = Path("/sys/devices/system/cpu")
_STATM = Path("/proc/self/statm")
_STAT = Path("/proc/stat")
_TASKS = Path("/proc/self/task")
_SYSTEM, _NICE = 12, 16  # of the fields of /proc/PID/stat behind the name (proc_pid_stat(5))


@dataclass(frozen=True, slots=True)
class Cores:
    """The processors that this process may use, and the seconds that they have computed since the machine started.

    `running` threads of the whole machine compute or could at this moment, the one that asks among them. Where the
    system does not tell, they are more than there can be.
    """

    count: int
    busy_s: float
    running: int


def free_memory_bytes() -> int:
    """Memory that new allocations can take without swapping."""
    if sys.platform == "darwin":
        return _sysctl(b"hw.memsize") * 3 // 4  # macOS tells no figure like Linux's MemAvailable
    available = _meminfo("MemAvailable")
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return available
    return max(0, min(available, limit - used + _cgroup_cache_bytes()))


def total_memory_bytes() -> int:
    """Of the machine, or what the cgroup allows."""
    if sys.platform == "darwin":
        return _sysctl(b"hw.memsize")
    total = _meminfo("MemTotal")
    return min(total, _number(_CGROUP / "memory.max") or total)


def mapped_bytes() -> int:
    """What this process has in memory of the files it maps, in bytes; 0 where the system does not tell."""
    pages = (_text(_STATM) or "0 0 0").split()[2]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def physical_cores() -> int:
    """Cores that this process may use: its affinity without hyper-threads, and the cgroup's share."""
    if sys.platform == "darwin":
        return _sysctl(b"hw.perflevel0.physicalcpu") or os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    siblings = {_text(_CPU / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    quota, _, period = (_text(_CGROUP / "cpu.max") or "max").partition(" ")
    share = len(siblings) if quota == "max" else max(1, int(quota) // int(period))
    return max(1, min(len(siblings), share))


def cores() -> Cores | None:
    """None where the system does not tell. Work that gives way (nice) does not count, unless ours gives way as well;
    but what the kernel does for it counts: see `yielding_children_s`.
    """
    if sys.platform == "darwin":
        return None
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line for line in (_text(_STAT) or "").splitlines() if line.startswith(("cpu", "procs_running"))]
    fields = {name: numbers for name, *numbers in map(str.split, lines)}
    found = [[int(ticks) for ticks in fields[name]] for name in fields.keys() & names]
    polite = os.nice(0) > 0
    busy = sum(user + nice * polite + system + irq + softirq for user, nice, system, _, _, irq, softirq, *_ in found)
    running = int(fields.get("procs_running", [sys.maxsize])[0])
    return Cores(len(found), busy / os.sysconf("SC_CLK_TCK"), running) if found else None


def yielding_children_s() -> float:
    """Seconds that the kernel has computed for the children of this process that give way; 0 where it does not tell."""
    pids = [pid for task in _TASKS.glob("*/children") for pid in (_text(task) or "").split()]
    found = [(_text(Path(f"/proc/{pid}/stat")) or "").rpartition(")")[2].split() for pid in pids]
    ticks = sum(int(fields[_SYSTEM]) for fields in found if fields and int(fields[_NICE]) > 0)
    return ticks / os.sysconf("SC_CLK_TCK")


def _meminfo(name: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _cgroup_cache_bytes() -> int:
    """Page cache that the cgroup's limit counts, but that is given back when memory is needed."""
    lines = (_text(_CGROUP / "memory.stat") or "").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdigit() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _sysctl(name: bytes) -> int:
    value = ctypes.c_int64(0)
    size = ctypes.c_size_t(8)
    ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0)
    return value.value
