"""What others do to a stream: those who came before, those who run beside it, other models."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import llama_cpp

from rustllama.engine.native import Context, Model
from tests.conftest import Server
from tests.figures.serving import ask, attention, compute_s, load, median, serving, stopped, words

CROWD = 8
SLOTS = 16
_DEPTH = 1_700  # tokens
_N_CTX = 2_048
_BEGINS_S = 3.0  # an answer whose prompt is kept


def retained(path: Path, rounds: int, conversations: int = 64) -> None:
    """One stream, beside so many conversations that are kept, against one on a server that keeps none."""
    ratios = []
    with serving(path, NUM_CTX=str(_N_CTX)) as full, serving(path, NUM_CTX=str(_N_CTX)) as empty:
        lengths = {"prompt_tokens": 300, "answer_tokens": 40}
        load(full, path, concurrency=SLOTS, requests=conversations, **lengths)
        for number in range(rounds):
            rates = _rates(full, empty, path, seed=number)
            print(f"beside {conversations} conversations {rates[0]:.1f} tokens/s, alone {rates[1]:.1f}", flush=True)
            ratios.append(rates[0] / rates[1])
    print(f"beside {conversations} conversations: {median(ratios)} of the rate with none")


def adjacent(path: Path, rounds: int, others: int = 100) -> None:
    """Steps of 16 deep streams after many others came and went, against a unified cache as llama.cpp makes it."""
    ratios = []
    answer = 60
    with (
        closing(Model(str(path))) as model,
        _unified(model) as unified,
        serving(path, NUM_CTX=str(_N_CTX), SLOTS=str(SLOTS)) as server,
    ):
        for _ in range(rounds):
            _come_and_go(server, path, others)
            # they share what they read: the first would have answered before the last had read a prompt of its own
            deep = {"prompt_tokens": _DEPTH, "shared_prefix": _DEPTH - 40, "answer_tokens": answer}
            found = load(server, path, concurrency=SLOTS, requests=SLOTS, warmup=0, **deep)
            assert found.together_tokens_per_s is not None
            step_ms, unified_ms = (
                SLOTS / found.together_tokens_per_s * 1e3,
                _steps_ms(unified, [_DEPTH] * SLOTS, answer),
            )
            print(f"a step of {SLOTS}: {step_ms:.1f} ms; in a unified cache {unified_ms:.1f} ms", flush=True)
            ratios.append(step_ms / unified_ms)
    print(f"a step of {SLOTS} streams at depth {_DEPTH}: {median(ratios)} of a unified cache's")


def deep(path: Path, rounds: int, depth: int = 6_000) -> None:
    """Steps of 7 short streams beside one of 6,000 tokens, against one plain batch of them all."""
    ratios, others, n_ctx = list[float](), CROWD - 1, depth + _N_CTX
    said, lengths = words(random.Random(depth), depth), {"prompt_tokens": 32, "answer_tokens": 100}
    with (
        closing(Model(str(path))) as model,
        closing(_bare(model, path, n_ctx)) as bare,
        serving(path, NUM_CTX=str(n_ctx), SLOTS=str(CROWD)) as server,
    ):
        depths = [64] * others + [depth]
        for slot, held in enumerate(depths):
            _fill(bare, slot, held)
        ask(server, path, said, num_predict=1)
        for seed in range(rounds):
            with ThreadPoolExecutor(1) as clients:
                long_one = clients.submit(ask, server, path, said, num_predict=400, temperature=1.0, seed=seed)
                time.sleep(_BEGINS_S)
                found = load(server, path, concurrency=others, requests=others, warmup=0, **lengths)
                assert not long_one.done(), "it did not outlast the others"
            assert found.together_tokens_per_s is not None
            step_ms, plain_ms = others / found.together_tokens_per_s * 1e3, _steps_ms(bare, depths, 20)
            print(f"a step of {CROWD}: {step_ms:.1f} ms; in one plain batch {plain_ms:.1f} ms", flush=True)
            ratios.append(step_ms / plain_ms)
    print(f"a step of {others} short streams and one of {depth} tokens: {median(ratios)} of a plain batch's")


def _bare(model: Model, path: Path, n_ctx: int) -> Context:
    return Context(model, n_ctx=n_ctx, n_slots=CROWD, n_batch=512, n_threads=2, flash_attention=attention(path))


def _fill(context: Context, slot: int, held: int) -> None:
    for start in range(0, held, 512):
        size = min(512, held - start)
        context.decode(range(100, 100 + size), range(start, start + size), [slot] * size, False)


def _come_and_go(server: Server, path: Path, count: int) -> None:
    rng = random.Random(count)

    def one(number: int) -> None:
        said = words(rng, rng.randint(10, 100))
        ask(server, path, said, num_predict=rng.randint(1, 60), seed=number)

    with ThreadPoolExecutor(SLOTS + CROWD) as clients:
        list(clients.map(one, range(count)))


@contextmanager
def _unified(model: Model) -> Iterator[Context]:
    """llama.cpp with one KV cache for all: a bare context whose slots hold deep prompts."""
    make = llama_cpp.llama_init_from_model

    def unified(model: object, params: llama_cpp.llama_context_params) -> object:
        params.kv_unified = True
        return make(model, params)

    llama_cpp.llama_init_from_model = unified
    try:
        context = Context(model, n_ctx=_N_CTX, n_slots=SLOTS, n_batch=512, n_threads=2)
    finally:
        llama_cpp.llama_init_from_model = make
    with closing(context):
        for slot in range(SLOTS):
            _fill(context, slot, _DEPTH)
        yield context


def _steps_ms(context: Context, depths: list[int], count: int) -> float:
    """Median of so many steps of all slots, which are taken back."""
    times, slots = [], range(len(depths))
    for further in range(count):
        started_s = time.perf_counter()
        context.decode([7] * len(depths), [depth + further for depth in depths], slots, True)
        times.append((time.perf_counter() - started_s) * 1e3)
    for slot, depth in enumerate(depths):
        context.cut(slot, depth)
    return statistics.median(times)


def neighbours(path: Path, rounds: int) -> None:
    """Two servers on the same cores that answer a stream each, against one that answers alone."""
    lengths = {"concurrency": 1, "requests": 1, "warmup": 0, "prompt_tokens": 32, "answer_tokens": 200}
    with serving(path, NUM_CTX=str(_N_CTX)) as one, serving(path, NUM_CTX=str(_N_CTX)) as other:

        def rate(server: Server) -> float:
            return load(server, path, **lengths).together_tokens_per_s or 0.0

        alone, both = list[float](), list[float]()
        for _ in range(rounds):
            with stopped(other):
                alone.append(rate(one))
            with ThreadPoolExecutor(2) as clients:
                both += clients.map(rate, (one, other))
    print(f"alone {median(alone)} tokens/s; two at once, each {median(both)}")


def reproducible(path: Path, rounds: int, requests: int = 100) -> None:
    """Reproducible answers one at a time among others, against those given alone; and what it costs the others."""
    rng = random.Random(1)
    options = {"reproducible": True, "temperature": 1.0, "num_predict": 40}
    prompts = [words(rng, 60) for _ in range(10)]
    with serving(path, NUM_CTX=str(_N_CTX), SLOTS=str(SLOTS)) as server:
        alone = [ask(server, path, prompt, **options).text for prompt in prompts]
        equal, ratios = 0, []
        for _ in range(rounds):
            undisturbed = _crowd_rate(server, path, lambda: time.sleep(15))
            texts: list[str] = []
            share = prompts * (requests // len(prompts) // rounds)

            def disturb(share: list[str] = share, texts: list[str] = texts) -> None:
                texts.extend(ask(server, path, prompt, **options).text for prompt in share)

            disturbed = _crowd_rate(server, path, disturb)
            equal += sum(text == alone[number % len(prompts)] for number, text in enumerate(texts))
            ratios.append(disturbed / undisturbed)
            print(f"{equal} equal; the others {disturbed:.1f} tokens/s, without it {undisturbed:.1f}", flush=True)
    print(f"{equal} of {len(share) * rounds} equal; the others at {median(ratios)} of their rate")


def _crowd_rate(server: Server, path: Path, meanwhile: Callable[[], None]) -> float:
    """Tokens a second of the crowd, all answers that ended while something else went on."""
    over, counts = threading.Event(), list[int]()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            answer = ask(server, path, words(rng, rng.randint(20, 60)), num_predict=rng.randint(20, 80))
            counts.append(answer.end["eval_count"])

    started_s = time.perf_counter()
    with ThreadPoolExecutor(CROWD) as clients:
        for seed in range(CROWD):
            clients.submit(client, seed)
        meanwhile()
        over.set()
    return sum(counts) / (time.perf_counter() - started_s)


def shares(paths: list[Path], seconds: float = 20) -> None:
    """What each of several models that are busy at once gets of the time in llama.cpp."""
    over = threading.Event()

    def client(path: Path) -> None:
        rng = random.Random(path.stem)
        while not over.is_set():
            ask(server, path, words(rng, 50), num_predict=60)

    with serving(*paths, NUM_CTX="512") as server, ThreadPoolExecutor(CROWD) as clients:
        for path in paths * (CROWD // len(paths)):
            clients.submit(client, path)
        time.sleep(2)
        before = [compute_s(server, path) for path in paths]
        time.sleep(seconds)
        spent = [compute_s(server, path) - start for path, start in zip(paths, before, strict=True)]
        over.set()
    for path, used in zip(paths, spent, strict=True):
        print(f"{path.stem}: {used:.1f} s, a share of {used / sum(spent):.2f}")


def drafting(path: Path, rounds: int) -> None:
    """Answers with prompt lookup against answers without: greedy ones of this model, and random ones."""
    ratios: dict[str, list[float]] = {"greedy": [], "random": []}
    with serving(path, NUM_CTX=str(_N_CTX)) as on, serving(path, NUM_CTX=str(_N_CTX), SPECULATION="0") as off:
        for number in range(rounds):
            for name, temperature in (("greedy", 0.0), ("random", 2.0)):
                rates = _rates(on, off, path, seed=number, temperature=temperature)
                print(f"{name}: {rates[0]:.1f} tokens/s, without drafts {rates[1]:.1f}", flush=True)
                ratios[name].append(rates[0] / rates[1])
    for name, found in ratios.items():
        print(f"{name} answers: {median(found)} times the rate without drafts")


def _rates(one: Server, other: Server, path: Path, seed: int, temperature: float = 1.0) -> tuple[float, float]:
    """Of the same question, each while the other server stands still."""
    pair = [(one, other), (other, one)]
    rates = {}
    for asked, still in reversed(pair) if seed % 2 else pair:
        with stopped(still):
            rates[asked.url] = _rate(asked, path, seed, temperature)
    return rates[one.url], rates[other.url]


def _rate(server: Server, path: Path, seed: int, temperature: float) -> float:
    said = words(random.Random(seed), 100)
    return ask(server, path, said, num_predict=300, temperature=temperature, seed=seed).tokens_per_s
