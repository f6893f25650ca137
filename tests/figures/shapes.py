"""So many streams through a server, against one plain batch of them, and against the cheapest split or padding that
the bare curve of the same round allows.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import msgspec

from rustllama.engine.native import Context, Model
from tests.figures.serving import attention, load, median, scrape, serving, stopped

SLOTS = 16
PROMPT, ANSWER = 40, 48  # tokens
_SHARED = 16  # of a prompt's; they are read once for all, or the first would end before the last begins
_DEPTH = PROMPT + ANSWER // 2  # in the mean of a run: attention is a good part of what a call costs
_TRIES = 5
_PER_CURVE = 2  # runs: the machine's own speed drifts

Curve = Mapping[int, float]
"""Milliseconds of a decode call, by its rows."""


def measure(path: Path, streams: list[int], rounds: int) -> None:
    curve: Curve = {}
    plain: dict[int, list[float]] = {count: [] for count in streams}
    best: dict[int, list[float]] = {count: [] for count in streams}
    with serving(path, NUM_CTX="512", SLOTS=str(SLOTS)) as server:
        for _ in range(rounds):
            for turn, count in enumerate(random.sample(streams, len(streams))):
                if turn % _PER_CURVE == 0:
                    with stopped(server):
                        curve = bare_curve(path)
                lengths = {"prompt_tokens": PROMPT, "shared_prefix": _SHARED, "answer_tokens": ANSWER}
                found = load(server, path, concurrency=count, requests=count, warmup=0, **lengths)
                assert found.together_tokens_per_s is not None
                plain[count].append(found.together_tokens_per_s * curve[count] / count / 1e3)
                best[count].append(found.together_tokens_per_s * cheapest(curve, count) / count / 1e3)
        calls = scrape(server).named("rustllama_decode_call_seconds")
        print("the server's curve, ms:", {call.labels["rows"]: round(call.value * 1e3, 1) for call in calls})
    for count in streams:
        print(f"{count} streams: {median(plain[count])} of one plain batch, {median(best[count])} of the cheapest way")


def bare_curve(path: Path) -> Curve:
    """In a process of its own."""
    command = [sys.executable, "-m", "tests.figures", "curve", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return msgspec.json.decode(done.stdout, type=dict[int, float])


def curve(path: Path) -> dict[int, float]:
    """Medians of a few tries in random order, on sequences that hold a prompt and half of an answer."""
    took: dict[int, list[float]] = {}
    with closing(Model(str(path))) as model, closing(_context(path, model)) as context:
        for slot in range(SLOTS):
            context.decode(range(100, 100 + _DEPTH), range(_DEPTH), [slot] * _DEPTH, [i == 0 for i in range(_DEPTH)])
        for _ in range(_TRIES):
            for rows in random.sample(range(1, SLOTS + 1), SLOTS):
                started_s = time.perf_counter()
                context.decode([7] * rows, [_DEPTH] * rows, range(rows), True)
                took.setdefault(rows, []).append((time.perf_counter() - started_s) * 1e3)
                for slot in range(rows):
                    context.cut(slot, _DEPTH)
    return {rows: statistics.median(times) for rows, times in sorted(took.items())}


def _context(path: Path, model: Model) -> Context:
    return Context(model, n_ctx=512, n_slots=SLOTS, n_batch=512, n_threads=2, flash_attention=attention(path))


def cheapest(curve: Curve, count: int) -> float:
    """Milliseconds of the cheapest calls that advance so many sequences: any split, and any padding of the last."""
    best = [0.0]
    for total in range(1, count + 1):
        best.append(min(best[total - last] + curve[last] for last in range(1, total + 1)))
    pads = [best[count - last] + curve[last + pad] for last in range(1, count + 1) for pad in range(SLOTS - count + 1)]
    return min(pads)
