"""Servers to measure, and what one answer of theirs took."""

from __future__ import annotations

import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import requests

from rustllama import gguf
from rustllama.bench.compare import let_measure
from rustllama.bench.load import LoadRun, Plan
from rustllama.bench.report import Figures, Intrusion
from rustllama.client import Client
from rustllama.engine.native import plain_is_faster
from tests.conftest import Server, start_server
from tests.scrape import Scrape

WORDS = "abcdefghijkl"  # one token each in the toys
_PATIENCE_S = 600
_PROC_STAT = Path("/proc/stat")
_LITTLE = 0.01  # of the processors' time
_TRIES = 4
_LOOPS, _TURNS = 100, 1_000_000  # of some hundredths of a second each

T = TypeVar("T")


@contextmanager
def serving(*models: Path, home: Path | None = None, tree: Path | None = None, **settings: str) -> Iterator[Server]:
    """A server that has these models, named as their files, and has measured their decode calls.

    `tree` is the folder whose `rustllama` it runs, when it is not this one.
    """
    environ = {"RUSTLLAMA_KEEP_ALIVE": "-1", **{f"RUSTLLAMA_{name}": value for name, value in settings.items()}}
    if tree is not None:
        environ |= {"PYTHONPATH": str(tree.absolute()), "PYTHONSAFEPATH": "1"}  # not the one of the current folder
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(home or Path(folder), environ=environ)
        try:
            for model in models:
                body = {"name": model.stem, "modelpath": str(model.absolute())}
                requests.post(f"{server.url}/api/create", json=body, timeout=_PATIENCE_S)
                let_measure(Client(server.url), model.stem)
            yield server
        finally:
            server.stop()


def attention(path: Path) -> str:
    """`flash_attention` of a bare context that attends as the server does."""
    return "off" if plain_is_faster(gguf.read(path), n_threads=2, kv_cache_type="f16") else "auto"


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Its processes stand still: one that rests measures its calls, which takes the cores of another."""
    pids = server.process.pid, server.worker_pid  # the master first, which would miss its worker
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class Answer:
    first_s: float  # from the request to the first text, loading not counted
    text: str
    end: Mapping[str, Any]  # the last line

    @property
    def new_tokens(self) -> int:
        """Of the prompt, those that were computed."""
        return int(self.end["prompt_eval_count"] - self.end["prompt_eval_cached_count"])

    @property
    def tokens_per_s(self) -> float:
        return float((self.end["eval_count"] - 1) / self.end["eval_duration"] * 1e9)


def ask(server: Server, model: Path, said: str | list[dict[str, str]], **options: object) -> Answer:
    """A streamed chat: one message, or all of a conversation."""
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    body = {"model": model.stem, "messages": messages, "stream": True, "options": options}
    started_s, first_s, text = time.perf_counter(), 0.0, ""
    with requests.post(f"{server.url}/api/chat", json=body, stream=True, timeout=_PATIENCE_S) as reply:
        for line in reply.iter_lines():
            said_now = msgspec.json.decode(line)
            text += said_now["message"]["content"]
            first_s = first_s or (time.perf_counter() - started_s if text else 0.0)
    return Answer(first_s - said_now["load_duration"] / 1e9, text, said_now)


def load(server: Server, model: Path, **plan: Any) -> Figures:
    """A run of `rustllama bench` with that plan."""
    return _measure(server, model, plan)[0]


def intrude(server: Server, model: Path, tokens: int, **plan: Any) -> Intrusion:
    """What a prompt of so many tokens met that arrived in a run of `rustllama bench` with that plan."""
    _, found = _measure(server, model, {"intrude": tokens, **plan})
    assert found is not None
    return found


def _measure(server: Server, model: Path, plan: Mapping[str, Any]) -> tuple[Figures, Intrusion | None]:
    seed = random.SystemRandom().randrange(1 << 32)  # prompts that the server never saw
    found, disturbed = LoadRun(Plan(url=server.url, seed=seed, model=model.stem, **plan)).measure()
    assert not found.errors, found.errors
    return found, disturbed


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def scrape(server: Server) -> Scrape:
    return Scrape(requests.get(f"{server.url}/metrics", timeout=_PATIENCE_S).text)


def compute_s(server: Server, model: Path) -> float:
    """What this model has spent in llama.cpp's calls."""
    return scrape(server).value("rustllama_compute_seconds_total", model=model.stem)


def undisturbed(measure: Callable[[], T]) -> T:
    """What it finds while the host leaves this machine its processors: where others had more than a hundredth of their
    time, it is measured once more, whatever was found. The last of several tries counts.
    """
    for _ in range(_TRIES):
        stolen, total = _ticks()
        found = measure()
        share = (_ticks()[0] - stolen) / max(1, _ticks()[1] - total)
        if share <= _LITTLE:
            break
        print(f"once more: others had {share:.1%} of the processors", flush=True)
    return found


def unrest() -> float:
    """How much longer than in the median a loop of Python takes in the worst tenth, with nothing of ours beside it:
    what the machine itself does to a gap, also where the host tells of no time that it gave to others.
    """
    took_s = []
    for _ in range(_LOOPS):
        started_s = time.perf_counter()
        sum(range(_TURNS))
        took_s.append(time.perf_counter() - started_s)
    return statistics.quantiles(took_s, n=10)[-1] / statistics.median(took_s)


def _ticks() -> tuple[int, int]:
    """Of all processors since the start: those that others had, and all (proc_stat(5)); 0 where nobody tells."""
    if not _PROC_STAT.exists():
        return 0, 0
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, _PROC_STAT.read_text().split()[1:9])
    return steal, user + nice + system + idle + iowait + irq + softirq + steal


def median(values: Iterable[float]) -> str:
    """With the range it comes from."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f}, {len(ordered)} runs)"
