"""Paired runs, A B A B: a private server under load against the bare llama.cpp loop, on the same file and machine."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import requests

from rustllama.bench.load import LoadRun, Plan
from rustllama.bench.report import Figures
from rustllama.cli.home import Home
from rustllama.cli.private import private_server
from rustllama.client import Client
from rustllama.errors import Unavailable
from rustllama.replies import Message

MODEL_NAME = "bench"
_UNMEASURED = re.compile(r"^rustllama_unmeasured_decode_calls\{model=\"(.*)\"\} (.*)$", re.MULTILINE)
_REST_S = 4.0  # after a request: a server measures for a while in each rest
_MOST_RESTS = 20  # one that others disturb may never end
_TEMPLATE_TOKENS = 64  # room for what a chat template adds


@dataclass(frozen=True, slots=True)
class Pair:
    """Tokens a second of one run each."""

    server: float
    bare: float

    @property
    def ratio(self) -> float:
        return self.server / self.bare


@dataclass(frozen=True, slots=True)
class Comparison:
    """While all streams ran together, and over whole runs, prompts included."""

    together: list[Pair]
    whole: list[Pair]

    def lines(self) -> list[str]:
        return [
            f"pair {number}: server {pair.server:.1f} tokens/s, bare {pair.bare:.1f}, ratio {pair.ratio:.3f}; "
            f"whole run {whole.server:.1f}, {whole.bare:.1f}, {whole.ratio:.3f}"
            for number, (pair, whole) in enumerate(zip(self.together, self.whole, strict=True), 1)
        ] + [f"median ratio {_median_ratio(self.together):.3f}; whole run {_median_ratio(self.whole):.3f}"]

    def as_json(self) -> str:
        medians = {"together_ratio": _median_ratio(self.together), "whole_ratio": _median_ratio(self.whole)}
        return msgspec.json.encode({"together": self.together, "whole": self.whole, **medians}).decode()


def compare(path: Path, plan: Plan, pairs: int) -> Comparison:
    """Of the plan, only lengths and concurrency count. Raises Unavailable where a run fails.

    The private server takes its settings from the environment; what that leaves open is made as the bare loop has it:
    a slot for each stream, and a context that just holds its tokens.
    """
    num_ctx = plan.prompt_tokens + plan.answer_tokens + _TEMPLATE_TOKENS
    like_bare = {"RUSTLLAMA_SLOTS": str(plan.concurrency), "RUSTLLAMA_NUM_CTX": str(num_ctx)}
    together: list[Pair] = []
    whole: list[Pair] = []
    with (
        tempfile.TemporaryDirectory(prefix="rustllama-bench-") as folder,
        private_server(Home(Path(folder)), like_bare) as client,
    ):
        client.create(MODEL_NAME, str(path.absolute()))
        asked = replace(plan, url=client.url, api_key=client.api_key, api="rustllama", model=MODEL_NAME)
        load = LoadRun(replace(asked, requests=plan.concurrency))
        let_measure(client, MODEL_NAME)
        for _ in range(pairs):
            server, _ = load.measure()
            bare = run_bare(path, replace(plan, prompt_tokens=round(server.prompt_tokens or plan.prompt_tokens)))
            together.append(_pair(server.together_tokens_per_s, bare.together_tokens_per_s, server))
            whole.append(_pair(server.all_tokens_per_s, bare.all_tokens_per_s, server))
    return Comparison(together, whole)


def let_measure(client: Client, model: str) -> None:
    """A server measures its decode calls when it rests, which it does not do under load."""
    url, headers = f"{client.url}/metrics", {"Authorization": f"Bearer {client.api_key}"}
    for _ in range(_MOST_RESTS):
        hello = Message(role="user", content="Hello")
        deque(client.chat(model, [hello], {"num_predict": 1}), maxlen=0)
        time.sleep(_REST_S)
        told = dict(_UNMEASURED.findall(requests.get(url, headers=headers, timeout=_REST_S).text))
        if told.get(model) == "0.0":  # an older server does not tell
            break


def run_bare(path: Path, plan: Plan) -> Figures:
    """In a process of its own, so that neither side finds the other's threads and memory."""
    lengths = ["--prompt-tokens", str(plan.prompt_tokens), "--answer-tokens", str(plan.answer_tokens)]
    options = ["--bare", str(path), "--concurrency", str(plan.concurrency), *lengths, "--json"]
    command = [sys.executable, "-m", "rustllama", "bench", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"The bare loop failed: {done.stderr.strip()}")
    return msgspec.json.decode(done.stdout, type=Figures)


def _pair(server: float | None, bare: float | None, run: Figures) -> Pair:
    if server is None or bare is None or run.errors:
        why = "; ".join(run.errors) or "the streams never ran all together, so ask for longer answers"
        raise Unavailable(f"Nothing to compare: {why}.")
    return Pair(server, bare)


def _median_ratio(pairs: list[Pair]) -> float:
    return statistics.median(pair.ratio for pair in pairs)
