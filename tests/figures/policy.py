"""What the scheduler itself takes, without a model."""

from __future__ import annotations

import random
import time
from queue import SimpleQueue

from rustllama.core import Delta, GenerateRequest
from rustllama.engine.prefix_store import PrefixStore
from rustllama.engine.scheduler import Scheduler
from rustllama.engine.sequence import Sequence
from rustllama.engine.sharing import Sharing
from rustllama.engine.shelf import Shelf
from rustllama.engine.states import Cuts, Shape
from tests.figures.serving import median

_VOCABULARY = 32_000
_COMMON = 0.9  # of each prompt: the longest comparison there is but for the same prompt again


def admission(rounds: int, conversations: int = 64) -> None:
    """A prompt is admitted that begins like that many conversations which are kept: milliseconds, by its length."""
    for length in (2_500, 5_000, 10_000, 20_000):
        times = [_admission_ms(length, conversations, random.Random(seed)) for seed in range(rounds)]
        print(f"a prompt of {length} tokens against {conversations}: {median(times)} ms")


def _admission_ms(length: int, conversations: int, rng: random.Random) -> float:
    common = rng.choices(range(_VOCABULARY), k=round(_COMMON * length))
    own = length - len(common)
    shelf = Shelf(PrefixStore(limit_bytes=1 << 30), Shape("", length, 1, "", ""), Cuts(), token_bytes=1)
    for _ in range(conversations):
        shelf.put([*common, *rng.choices(range(_VOCABULARY), k=own)], length, memoryview(bytes(length)), 0)
    scheduler = Scheduler(1, 512, 1, 200, Sharing(shelf))
    prompt = (*common, *rng.choices(range(_VOCABULARY), k=own))
    outlet = SimpleQueue[Delta | Exception]()
    started_s = time.perf_counter()
    sequence = Sequence(GenerateRequest("", prompt, num_ctx=length + 1), outlet, 0)
    scheduler.add(sequence)
    scheduler.plan(0)
    took_ms = (time.perf_counter() - started_s) * 1e3
    assert sequence.cached >= len(common)
    return took_ms
