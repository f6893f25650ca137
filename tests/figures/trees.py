"""This tree's server against that of another tree (a worktree of an older commit), in turns: tokens a second of
`rustllama bench`, and the processor time of one short answer, over all processes of the server.
"""

from __future__ import annotations

import os
from pathlib import Path

import requests

from tests.conftest import Server
from tests.figures.serving import load, median, serving, stopped

_N_CTX = "1024"
_ANSWERS = 200


def measure(path: Path, other: Path, streams: int, rounds: int) -> None:
    rates, costs_ms = list[float](), list[float]()
    with serving(path, NUM_CTX=_N_CTX) as ours, serving(path, NUM_CTX=_N_CTX, tree=other) as theirs:
        for _ in range(rounds):
            with stopped(theirs):
                rate, cost_ms = _rate(ours, path, streams), _cost_ms(ours, path)
            with stopped(ours):
                other_rate, other_cost_ms = _rate(theirs, path, streams), _cost_ms(theirs, path)
            print(f"{rate:.1f} and {other_rate:.1f} tokens/s; {cost_ms:.2f} and {other_cost_ms:.2f} ms", flush=True)
            rates.append(rate / other_rate)
            costs_ms.append(cost_ms - other_cost_ms)
    print(f"{streams} streams: {median(rates)} of the other tree's tokens/s; {median(costs_ms)} ms more an answer")


def _rate(server: Server, model: Path, streams: int) -> float:
    run = load(server, model, concurrency=streams, requests=streams, prompt_tokens=64, answer_tokens=128)
    assert run.all_tokens_per_s is not None
    return run.all_tokens_per_s


def _cost_ms(server: Server, model: Path) -> float:
    """Processor time of an answer of one token, its call of llama.cpp included."""
    body = {"model": model.stem, "prompt": "a b c", "stream": False, "options": {"num_predict": 1}}
    with requests.Session() as client:
        before_s = _spent_s(server.process.pid)
        for _ in range(_ANSWERS):
            client.post(f"{server.url}/api/generate", json=body, timeout=60).raise_for_status()
        return (_spent_s(server.process.pid) - before_s) / _ANSWERS * 1e3


def _spent_s(pid: int) -> float:
    """Processor time of a process, its threads, and its children that live and that have ended (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(_spent_s(int(child)) for child in children)
