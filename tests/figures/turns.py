"""The first token of a late turn against a bare prefill of what is new in it: as it is, after an unload, a restart."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import requests

from rustllama.engine.native import Context, Model
from tests.conftest import Server
from tests.figures.serving import Answer, ask, attention, median, serving, words

TURNS = 10
N_CTX = 4096
ANSWER = 60  # tokens; random words, so that they seldom tokenize back to themselves
QUESTION = 160
_AWAY_S = 1.0  # an unload goes on after its answer


@dataclass(slots=True)
class Chat:
    """One conversation, with the model that answers it loaded here as well, bare."""

    path: Path
    model: Model
    rng: random.Random
    messages: list[dict[str, str]] = field(default_factory=list)

    def turn(self, server: Server) -> Answer:
        self.messages.append({"role": "user", "content": words(self.rng, QUESTION)})
        answer = ask(server, self.path, self.messages, num_predict=ANSWER, temperature=1.5, seed=len(self.messages))
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def bare_prefill_s(self, answer: Answer) -> float:
        """One call with as many tokens, at the same depth."""
        depth, new = answer.end["prompt_eval_cached_count"], answer.new_tokens
        tokens = self.rng.choices(range(100, 500), k=depth + new)
        with closing(self._context()) as context:
            for start in range(0, depth, 512):
                end = min(start + 512, depth)
                context.decode(tokens[start:end], range(start, end), [0] * (end - start), False)
            return statistics.median(self._prefill_s(context, tokens, depth) for _ in range(3))

    def _context(self) -> Context:
        flash_attention = attention(self.path)
        return Context(self.model, n_ctx=N_CTX, n_slots=1, n_batch=512, n_threads=2, flash_attention=flash_attention)

    def _prefill_s(self, context: Context, tokens: list[int], depth: int) -> float:
        new = len(tokens) - depth
        started_s = time.perf_counter()
        context.decode(tokens[depth:], range(depth, len(tokens)), [0] * new, [i == new - 1 for i in range(new)])
        spent_s = time.perf_counter() - started_s
        context.cut(0, depth)
        return spent_s

    def compare(self, server: Server, case: str, first_turn: Answer) -> float:
        answer = self.turn(server)
        bare_s = self.bare_prefill_s(answer)
        ratio = answer.first_s / bare_s
        print(
            f"{case}: {answer.end['prompt_eval_count']} tokens, {answer.new_tokens} new; first token after "
            f"{answer.first_s * 1e3:.0f} ms, bare prefill {bare_s * 1e3:.0f} ms: {ratio:.2f}; "
            f"of turn 1 {answer.first_s / first_turn.first_s:.2f}",
            flush=True,
        )
        return ratio


def measure(path: Path, rounds: int) -> None:
    model = Model(str(path))
    found: dict[str, list[float]] = {}
    for seed in range(rounds):
        chat = Chat(path, model, random.Random(seed))
        for case, ratio in _round(chat):
            found.setdefault(case, []).append(ratio)
    for case, ratios in found.items():
        print(f"{case}: first token after {median(ratios)} times the bare prefill")


def _round(chat: Chat) -> list[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as home:
        with serving(chat.path, home=Path(home), NUM_CTX=str(N_CTX), PROMPT_CACHE_DISK="4GiB") as server:
            first, *_ = [chat.turn(server) for _ in range(TURNS - 1)]
            cases = [_case(f"turn {TURNS}", chat, server, first)]
            requests.post(f"{server.url}/api/chat", json={"model": chat.path.stem, "keep_alive": 0}, timeout=60)
            time.sleep(_AWAY_S)
            cases.append(_case("after an unload", chat, server, first))
        with serving(chat.path, home=Path(home), NUM_CTX=str(N_CTX), PROMPT_CACHE_DISK="4GiB") as server:
            cases.append(_case("after a restart", chat, server, first))
    return cases


def _case(name: str, chat: Chat, server: Server, first: Answer) -> tuple[str, float]:
    return name, chat.compare(server, name, first)
