"""So many streams through a server, against one plain batch of them, and against the cheapest split or padding that
bare calls allow: those are made right before and right after, as the machine's own speed drifts.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import msgspec

from rustllama.engine.native import Context, Model
from tests.conftest import Server
from tests.figures.serving import attention, load, median, scrape, serving, stopped, undisturbed

SLOTS = 16
PROMPT, ANSWER = 40, 48  # tokens
_SHARED = 16  # of a prompt's; they are read once for all, or the first would end before the last begins
_DEPTH = PROMPT + ANSWER // 2  # in the mean of a run: attention is a good part of what a call costs
_TRIES = 5

Curve = Mapping[int, float]
"""Milliseconds of a decode call, by its rows."""


def measure(path: Path, streams: list[int], rounds: int) -> None:
    plain: dict[int, list[float]] = {count: [] for count in streams}
    best: dict[int, list[float]] = {count: [] for count in streams}
    with serving(path, NUM_CTX="512", SLOTS=str(SLOTS)) as server, bare(path) as calls_ms:
        for _ in range(rounds):
            with stopped(server):
                curve = calls_ms(range(1, SLOTS + 1))
            for count in random.sample(streams, len(streams)):
                calls = cheapest(curve, count)
                rate, call_ms = undisturbed(partial(_pair, server, path, calls_ms, count, calls))
                plain[count].append(rate * call_ms[count] / count)
                best[count].append(rate * sum(call_ms[rows] for rows in calls) / count)
        known = scrape(server).named("rustllama_decode_call_seconds")
        print("the server's curve, ms:", {call.labels["rows"]: round(call.value * 1e3, 1) for call in known})
    for count in streams:
        print(f"{count} streams: {median(plain[count])} of one plain batch, {median(best[count])} of the cheapest way")


def _pair(
    server: Server, path: Path, calls_ms: Callable[[Iterable[int]], Curve], count: int, calls: tuple[int, ...]
) -> tuple[float, Curve]:
    """The server's rate, and what bare calls took right before and right after."""
    with stopped(server):
        before = calls_ms({count, *calls})
    rate = _rate(server, path, count)
    with stopped(server):
        after = calls_ms({count, *calls})
    return rate, {rows: (before[rows] + after[rows]) / 2 for rows in before}


def _rate(server: Server, path: Path, count: int) -> float:
    """Tokens a millisecond while all streams run."""
    lengths = {"prompt_tokens": PROMPT, "shared_prefix": _SHARED, "answer_tokens": ANSWER}
    found = load(server, path, concurrency=count, requests=count, warmup=0, **lengths)
    assert found.together_tokens_per_s is not None
    return found.together_tokens_per_s / 1e3


@contextmanager
def bare(path: Path) -> Iterator[Callable[[Iterable[int]], Curve]]:
    """llama.cpp in a process of its own, which computes only while it is asked for calls of some sizes."""
    command = [sys.executable, "-m", "tests.figures", "calls", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answered = process.stdin, process.stdout

        def calls_ms(sizes: Iterable[int]) -> Curve:
            asked.write(f"{msgspec.json.encode(sorted(sizes)).decode()}\n")
            asked.flush()
            return msgspec.json.decode(answered.readline(), type=dict[int, float])

        yield calls_ms


def answer_calls(path: Path, asked: TextIO, answer: Callable[[bytes], None]) -> None:
    """What the process of `bare` does. The sequences hold a prompt and half of an answer."""
    with closing(Model(str(path))) as model, closing(_context(path, model)) as context:
        for slot in range(SLOTS):
            context.decode(range(100, 100 + _DEPTH), range(_DEPTH), [slot] * _DEPTH, [i == 0 for i in range(_DEPTH)])
        for line in asked:
            answer(msgspec.json.encode(_calls_ms(context, msgspec.json.decode(line, type=list[int]))))


def _calls_ms(context: Context, sizes: list[int]) -> Curve:
    """Medians of a few tries in random order."""
    took: dict[int, list[float]] = {rows: [] for rows in sizes}
    for _ in range(_TRIES):
        for rows in random.sample(sizes, len(sizes)):
            started_s = time.perf_counter()
            context.decode([7] * rows, [_DEPTH] * rows, range(rows), True)
            took[rows].append((time.perf_counter() - started_s) * 1e3)
            for slot in range(rows):
                context.cut(slot, _DEPTH)
    return {rows: statistics.median(times) for rows, times in took.items()}


def _context(path: Path, model: Model) -> Context:
    return Context(model, n_ctx=512, n_slots=SLOTS, n_batch=512, n_threads=2, flash_attention=attention(path))


def cheapest(curve: Curve, count: int) -> tuple[int, ...]:
    """Rows of the cheapest calls that advance so many sequences: any split, and any padding of the last."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for total in range(1, count + 1):
        best.append(min(_and_one(curve, best[total - last], last) for last in range(1, total + 1)))
    pads = range(SLOTS - count + 1)
    return min(_and_one(curve, best[count - last], last + pad) for last in range(1, count + 1) for pad in pads)[1]


def _and_one(curve: Curve, calls: tuple[float, tuple[int, ...]], rows: int) -> tuple[float, tuple[int, ...]]:
    cost, sizes = calls
    return cost + curve[rows], (*sizes, rows)
