"""The bare llama.cpp loop: decode and sample, without a server. What it reaches is the limit for one."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

from rustllama import gguf
from rustllama.bench.report import Figures, figures
from rustllama.bench.trace import Trace
from rustllama.core import SamplingParams
from rustllama.engine import attention
from rustllama.engine.machine import physical_cores
from rustllama.engine.native import Context, Model, Sampler, gpu_layers, plain_is_faster
from rustllama.engine.sampling import chain
from rustllama.settings import Settings

_WARMUP_TOKENS = 4


def measure(path: Path, settings: Settings, streams: int, prompt_tokens: int, answer_tokens: int) -> Figures:
    """One run after a short one that touches the weights. Blocking; raises BadModelFile and OutOfMemory."""
    with contextlib.closing(BareLoop(path, settings, streams, prompt_tokens + answer_tokens)) as loop:
        loop.run(prompt_tokens, _WARMUP_TOKENS)
        return figures(loop.run(prompt_tokens, answer_tokens))


class BareLoop:
    """A model and `streams` sequences with the threads, batch and flash attention that a server would take."""

    def __init__(self, path: Path, settings: Settings, streams: int, tokens: int) -> None:
        """`tokens` is the longest prompt and answer together."""
        info, n_threads = gguf.read(path), settings.num_thread or physical_cores()
        layers = gpu_layers(info, settings.num_gpu)
        self._model = Model(str(path), num_gpu=layers, use_mmap=settings.use_mmap)
        self._batch, numbers = settings.num_batch, settings.kv_cache_type
        is_open = attention.is_open(settings.flash_attention, layers)
        plain = is_open and plain_is_faster(info, n_threads=n_threads, kv_cache_type=numbers)
        self._context = Context(
            self._model,
            n_ctx=tokens,
            n_slots=streams,
            n_batch=settings.num_batch,
            n_threads=n_threads,
            flash_attention="off" if plain else settings.flash_attention,
            kv_cache_type=numbers,
        )
        greedy = chain(SamplingParams(temperature=0), vocabulary_size=self._model.n_vocab, context_length=tokens)
        self._sampler = Sampler(greedy)  # it keeps no state: one serves all
        self._slots = list(range(streams))

    def run(self, prompt_tokens: int, answer_tokens: int) -> list[Trace]:
        """Each prompt in turn, in calls of the batch's size; then all answers together, a token each in a call."""
        started_s = time.perf_counter()
        begun = [self._prefill(slot, prompt_tokens) for slot in self._slots]
        tokens, steps = [token for token, _ in begun], list[tuple[float, int]]()
        for position in range(prompt_tokens, prompt_tokens + answer_tokens - 1):
            self._context.decode(tokens, [position] * len(tokens), self._slots, True)
            tokens = [self._context.sample(self._sampler, slot) for slot in self._slots]
            steps.append((time.perf_counter(), 1))
        return [Trace(started_s, ((first_s, 1), *steps), prompt_tokens, answer_tokens) for _, first_s in begun]

    def close(self) -> None:
        self._sampler.close()
        self._context.close()
        self._model.close()

    def _prefill(self, slot: int, count: int) -> tuple[int, float]:
        """The first token of the answer to `count` tokens by chance, and when it was there."""
        self._context.clear(slot)
        prompt = random.Random(slot).choices(range(self._model.n_vocab), k=count)
        for start in range(0, count, self._batch):
            part = prompt[start : start + self._batch]
            wanted = [start + row == count - 1 for row in range(len(part))]
            self._context.decode(part, range(start, start + len(part)), [slot] * len(part), wanted)
        return self._context.sample(self._sampler, len(part) - 1), time.perf_counter()
