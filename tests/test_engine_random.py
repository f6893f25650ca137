"""Conversations at random: whatever the engine does for others meanwhile, each answer is what a fresh engine gives."""

from __future__ import annotations

import random
import string
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import gevent
import pytest
from gevent.lock import Semaphore

from rustllama.core import GenerateRequest, LoadOptions, MemoryPlan, Span
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.engine import LlamaEngine, LlamaEngines
from rustllama.engine.memory import token_bytes
from rustllama.engine.sequence import Sequence
from rustllama.engine.states import as_tokens, common_prefix
from rustllama.errors import Cancelled, InternalError
from rustllama.settings import Settings
from tests.conftest import SHAPES
from tests.test_engine_lane import N_CTX, SLOTS, record, until_idle
from tests.test_engine_reuse import GREEDY, assert_a_fresh_engine_agrees, said
from tests.toys import CONTROL_TOKENS, write_toy

TALKS, LARGE_CTX, ANSWER = 50, 1024, 16
STORED, STORED_TOKENS = 25, 2000  # states in memory, and their tokens: too few for all
DISK_BYTES = (0, 100_000_000, 2_000_000)
QUESTION, REPLY = "<|im_start|>", "<|im_end|><|im_start|>"


@pytest.fixture(scope="module", params=SHAPES)
def wordy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers in words, which its tokenizer spells letter by letter."""
    return write_toy(tmp_path_factory.mktemp("wordy") / "toy.gguf", SHAPES[request.param], vocabulary=4096)


class World:
    """Conversations with a model that is unloaded and loaded again meanwhile."""

    def __init__(self, toy: Path, seed: int, home: Path) -> None:
        self.sequences: list[Sequence] = []  # all that were submitted
        self.ended: list[Sequence] = []  # those of them that came to their end
        self.respelled = 0  # prompts that are other tokens than their text alone gives
        self._rng = random.Random(seed)
        self._record = record(toy)
        exact = Settings(flash_attention="off", kv_cache_type="f32", num_thread=1, home=home)
        room = STORED * self._record.info.recurrent_state_bytes + STORED_TOKENS * token_bytes(self._record.info, exact)
        self.engines = LlamaEngines(replace(exact, prompt_cache_memory=room, prompt_cache_disk=DISK_BYTES[seed]))
        self._engine = self._load()
        self._loaded = Semaphore()  # held by who needs the model as it is
        self._beginnings = [said(seed, self._rng.randint(20, 120)) for seed in range(3)]
        self._topics = [self._text(self._rng.randint(20, 120)) for _ in range(3)]

    def play(self) -> None:
        talks = [gevent.spawn_later(self._rng.random() * 0.3, self._talk, number) for number in range(TALKS)]
        while not all(talk.ready() for talk in talks):
            gevent.sleep(self._rng.uniform(0.02, 0.2))
            self._reload(at_once=self._rng.random() < 0.5)
        gevent.joinall(talks, raise_error=True)
        self._engine.close()

    def _load(self) -> LlamaEngine:
        engine = self.engines(self._record, LoadOptions(), MemoryPlan(N_CTX, SLOTS, 0))
        engine.reserve(LARGE_CTX, available_bytes=10**9)
        for lane in engine._lanes:
            costs = [self._rng.uniform(1, 2) for _ in range(16)]  # calls of any shape, and drafts
            lane._scheduler.decode_cost = DecodeCost(lane.shape.n_slots, [0, *costs])
        return engine

    def _reload(self, *, at_once: bool) -> None:
        with self._loaded:
            if not at_once:
                until_idle(self._engine)
                self._engine.check_integrity()
            self._engine.close()
            self._engine = self._load()

    def _talk(self, number: int) -> None:
        """Some leave in the middle of an answer."""
        num_ctx = self._rng.choice([N_CTX, N_CTX, LARGE_CTX])
        with suppress(Cancelled):
            if number % 2:
                self._talk_by_text(num_ctx)
            else:
                self._talk_by_tokens(number, num_ctx)

    def _talk_by_tokens(self, number: int, num_ctx: int) -> None:
        prompt = self._rng.choice(self._beginnings)
        for turn in range(self._rng.randint(1, 4)):
            prompt += said(1000 * number + turn, self._rng.randint(2, 30))
            prompt = tuple(self._answer(prompt, num_ctx)[0].tokens)

    def _talk_by_text(self, num_ctx: int) -> None:
        spans: tuple[Span, ...] = (Span(QUESTION, trusted=True), Span(self._rng.choice(self._topics), trusted=False))
        for _ in range(self._rng.randint(1, 4)):
            spans += (Span(self._text(self._rng.randint(2, 30)), trusted=False), Span(REPLY, trusted=True))
            prompt = self._tokens(spans)
            if len(prompt) + ANSWER > N_CTX:
                return
            spans += (Span(self._answer(prompt, num_ctx)[1], trusted=False), Span(REPLY, trusted=True))

    def _answer(self, prompt: tuple[int, ...], num_ctx: int) -> tuple[Sequence, str]:
        """Asks again where the model was unloaded. Raises Cancelled."""
        while True:
            with suppress(InternalError):
                return self._ask(prompt, num_ctx)

    def _ask(self, prompt: tuple[int, ...], num_ctx: int) -> tuple[Sequence, str]:
        stop = ("".join(self._rng.choices("abcdef", k=2)),) if self._rng.random() < 0.3 else ()
        exactly = self._rng.random() < 0.2
        request = GenerateRequest("r", prompt, num_ctx, ANSWER, stop, GREEDY, reproducible=exactly)
        with self._loaded:
            stream = self._engine.submit(request)
        sequence = stream._sequence
        self.sequences.append(sequence)
        if self._rng.random() < 0.1:
            gevent.spawn_later(self._rng.random() * 0.02, stream.cancel)
        text = "".join(delta.text for delta in stream)
        self.ended.append(sequence)
        return sequence, text

    def _tokens(self, spans: tuple[Span, ...]) -> tuple[int, ...]:
        with self._loaded:
            tokens = self._engine.tokenize(spans, add_special=False)
            self.respelled += tokens != self._engine._tokenize(spans, False, [])
            names = dict(enumerate(name.encode() for name in CONTROL_TOKENS))
            pieces = [names.get(token) or self._engine._model.piece(token) for token in tokens]
        assert b"".join(pieces).decode() == "".join(span.text for span in spans), "another text than was asked"
        return tokens

    def _text(self, length: int) -> str:
        return "".join(self._rng.choices(string.ascii_lowercase + " ", k=length))


def held_by_another(sequence: Sequence, others: list[Sequence]) -> int:
    """How many tokens of its prompt are, one by one from the beginning, also those of another."""
    return max(common_prefix(sequence.prompt, as_tokens(other.tokens)) for other in others if other is not sequence)


@pytest.mark.parametrize("seed", range(3))
def test_conversations_at_random_answer_as_a_fresh_engine_does(
    wordy: Path, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shared beginnings, turns by tokens and by text, stop strings, cancels, contexts of two sizes, calls of any shape,
    drafts, unloads in the middle, little memory for states, and a disk for them, one that is soon full, or none.
    """
    world = World(wordy, seed, tmp_path)
    world.play()
    assert_a_fresh_engine_agrees(wordy, world.ended)
    assert all(sequence.cached <= held_by_another(sequence, world.sequences) for sequence in world.sequences)
    assert caplog.records == [], "no step failed, and no state was refused"
    assert len(world.sequences) > len(world.ended) > TALKS / 2
    assert any(sequence.cached for sequence in world.ended)
    assert world.respelled
    store = world.engines._shared.store
    assert store.used_bytes > store.limit_bytes / 2, "there was room for everything"
