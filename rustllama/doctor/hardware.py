"""What this machine gives: cores, memory and files, and the models that it could run."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

from rustllama.doctor import bandwidth
from rustllama.doctor.capacity import Fit, fits, limit_bytes
from rustllama.doctor.finding import Finding, hint, ok, wrong
from rustllama.engine.machine import free_memory_bytes, physical_cores, total_memory_bytes
from rustllama.engine.memory import gib
from rustllama.settings import Settings

_SPARE_FILES = 256


def examine(settings: Settings) -> Iterator[Finding]:
    cores, free, total = physical_cores(), free_memory_bytes(), total_memory_bytes()
    logical = os.cpu_count() or cores
    yield ok("cores", f"{cores} for llama.cpp, of {logical} logical ones in the machine.", cores=cores, logical=logical)
    yield ok("memory", f"{gib(free)} free of {gib(total)}.", free_bytes=free, total_bytes=total)
    if settings.memory_limit is not None and settings.memory_limit > total:
        yield hint("memory", f"RUSTLLAMA_MEMORY_LIMIT is {gib(settings.memory_limit)}, more than there is: lower it.")
    yield from open_files(settings.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    rate = bandwidth.measure(settings.num_thread or cores, free)
    yield ok("bandwidth", f"memory is read at {rate / 1e9:.0f} GB/s, measured just now.", bytes_per_s=int(rate))
    yield from _models(settings, free, rate)


def open_files(connections: int, hard: int) -> Iterator[Finding]:
    """`hard` is the limit up to which a process may raise its own."""
    most = connections if hard == resource.RLIM_INFINITY else min(connections, max(1, hard - _SPARE_FILES))
    if most < connections:
        yield hint(
            "open files",
            f"a process may open {hard}, which leaves {most} connections of RUSTLLAMA_MAX_CONNECTIONS={connections}: "
            "raise `ulimit -n`, or LimitNOFILE of the service.",
            limit=hard,
        )


def _models(settings: Settings, free: int, rate: float) -> Iterator[Finding]:
    available = limit_bytes(settings, free)
    found = list(fits(settings, available, rate))
    if not found:
        yield wrong("fits", f"{gib(available)} for models is too little for any usual one: free some memory.")
    for fit in found:
        yield _fit(fit)


def _fit(fit: Fit) -> Finding:
    slots = "1 slot" if fit.plan.n_slots == 1 else f"{fit.plan.n_slots} slots"
    return ok(
        "fits",
        f"{fit.model} in {fit.quantization} ({fit.size_bytes / 1e9:.1f} GB) with {slots} of {fit.plan.n_ctx:,} tokens, "
        f"at {fit.tokens_per_s:.2g} tokens/s for one answer at most: an estimate, bandwidth by size.",
        model=fit.model,
        quantization=fit.quantization,
        size_bytes=fit.size_bytes,
        slots=fit.plan.n_slots,
        context=fit.plan.n_ctx,
        tokens_per_s=round(fit.tokens_per_s, 2),
    )
