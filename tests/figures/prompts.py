"""What a prompt waits for, and what it makes others wait: many that begin alike, and a long one among streams."""

from __future__ import annotations

from pathlib import Path

from rustllama.bench.report import Figures, Intrusion, Spread
from tests.figures.serving import compute_s, intrude, load, median, serving, undisturbed, unrest

_CLIENTS = 16
_N_CTX = 4_096
_STREAMS = 4


def shared(path: Path, rounds: int) -> None:
    """16 prompts at once that have 500 of 520 tokens in common, against one such prompt alone."""
    lengths = {"prompt_tokens": 520, "answer_tokens": 32}
    crowd = {"concurrency": _CLIENTS, "requests": _CLIENTS, "shared_prefix": 500, **lengths}
    ratios: dict[str, list[float]] = {"cold": [], "where one was there before": []}
    with serving(path, NUM_CTX=str(_N_CTX), SLOTS=str(_CLIENTS)) as server:
        for _ in range(rounds):
            alone_ms = _first_token_ms(load(server, path, requests=3, warmup=0, **lengths))
            for warmup, (case, found) in enumerate(ratios.items()):
                first_ms = _first_token_ms(load(server, path, warmup=warmup, **crowd))
                print(f"{case}: first token after {first_ms:.0f} ms, alone {alone_ms:.0f} ms", flush=True)
                found.append(first_ms / alone_ms)
    for case, found in ratios.items():
        print(f"{_CLIENTS} prompts that begin alike, {case}: first token after {median(found)} times that of one alone")


def _first_token_ms(found: Figures) -> float:
    assert found.first_token_ms is not None
    return found.first_token_ms.p50


def intruder(path: Path, rounds: int, gap_ms: int, answer_tokens: int) -> None:
    """A prompt of 2,000 tokens among 4 streams: what it waits, against it alone, and the gaps between their tokens, as
    multiples of the target too: `--gap-ms`, or two steps of those streams where that is more.
    """
    streams = {"concurrency": _STREAMS, "requests": _STREAMS, "prompt_tokens": 64}
    gaps, p99, longest, ratios = list[Spread](), list[float](), list[float](), list[float]()
    with serving(path, NUM_CTX=str(_N_CTX), SLOTS=str(_CLIENTS), GAP_MS=str(gap_ms)) as server:

        def once() -> tuple[Figures, Intrusion]:
            alone = load(server, path, answer_tokens=64, **streams)
            return alone, intrude(server, path, 2_000, answer_tokens=answer_tokens, **streams)

        for _ in range(rounds):
            alone, found = undisturbed(once)
            assert alone.together_tokens_per_s is not None
            assert found.gap_meanwhile_ms is not None
            assert found.still_running == _STREAMS, "longer answers are needed"
            target_ms = max(gap_ms, 2 * _STREAMS / alone.together_tokens_per_s * 1e3)
            gaps.append(found.gap_meanwhile_ms)
            p99.append(gaps[-1].p99 / target_ms)
            longest.append(gaps[-1].longest / target_ms)
            ratios.append(found.ratio)
            print(f"gap {told(gaps[-1])}, target {target_ms:.0f} ms; first token {ratios[-1]:.2f} times", flush=True)
            print(f"a loop alone takes {unrest():.2f} times its median in the worst tenth", flush=True)
    print(f"gap {in_all(gaps)}; of the target p99 {median(p99)}, longest {median(longest)}")
    print(f"its first token after {median(ratios)} times what it takes alone")


def arrivals(path: Path, rounds: int, requests: int) -> None:
    """Prompts of 100 tokens that arrive by chance, at half of what the server can take, streams of 100: gaps, and what
    part of the time while there are requests is spent in llama.cpp's calls.
    """
    lengths = {"prompt_tokens": 100, "answer_tokens": 100}
    gaps, shares = list[Spread](), list[float]()
    with serving(path, NUM_CTX="1024", SLOTS=str(_CLIENTS)) as server:
        full = load(server, path, concurrency=_CLIENTS, requests=4 * _CLIENTS, **lengths)
        rate = full.requests / full.busy_s / 2
        for _ in range(rounds):
            before_s = compute_s(server, path)
            found = load(server, path, rate=rate, requests=requests, warmup=0, **lengths)
            calls_s = compute_s(server, path) - before_s
            assert found.gap_ms is not None
            print(f"{rate:.2f} a second: gap {told(found.gap_ms)}; {calls_s:.1f} of {found.busy_s:.1f} s", flush=True)
            gaps.append(found.gap_ms)
            shares.append(calls_s / found.busy_s)
    print(f"{rate:.2f} a second: gap {in_all(gaps)}; in llama.cpp {median(shares)} of the time")


def told(gaps: Spread) -> str:
    return f"p99 {gaps.p99:.0f} ms, longest {gaps.longest:.0f} ms"


def in_all(gaps: list[Spread]) -> str:
    """Over several runs."""
    return f"p99 {median(gap.p99 for gap in gaps)} ms, longest {median(gap.longest for gap in gaps)} ms"
