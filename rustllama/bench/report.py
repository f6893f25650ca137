"""The figures of a run, and how they are shown: a table for people, JSON for programs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import msgspec
from rich.console import Console
from rich.table import Table

from rustllama.bench.trace import Trace


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds."""

    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        if not seconds:
            return None
        ordered = sorted(value * 1000 for value in seconds)
        return cls(_percentile(ordered, 50), _percentile(ordered, 99), ordered[-1])


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all answers that ended well; None where there is nothing to tell."""

    requests: int
    left: int  # readers that hung up, as they were told to
    errors: dict[str, int]  # text: how often
    prompt_tokens: float | None  # median
    answer_tokens: int  # of all answers
    first_token_ms: Spread | None
    gap_ms: Spread | None
    stream_tokens_per_s: float | None  # median of the streams, each from its first token to its last
    together_tokens_per_s: float | None  # of all streams while every one of them had its first token and none its last
    busy_s: float  # while any request ran
    all_tokens_per_s: float | None  # from the first request to the last token, prompts included
    server_ms: dict[str, float]  # medians of what the server said


@dataclass(frozen=True, slots=True)
class Intrusion:
    """What one long prompt met, and what it did to the answers that were running."""

    prompt_tokens: int | None
    alone_ms: float  # to its first token
    among_ms: float
    ratio: float
    gap_meanwhile_ms: Spread | None  # between the tokens of the others, from its arrival to its first token
    still_running: int  # others that outlasted its first token: the rest of the figures holds only if all did


def figures(traces: Sequence[Trace]) -> Figures:
    done = [trace for trace in traces if trace.finished]
    prompts = [trace.prompt_tokens for trace in done if trace.prompt_tokens is not None]
    rates = [(trace.tokens - 1) / (trace.last_s - trace.first_s) for trace in done if trace.last_s > trace.first_s]
    tokens = sum(trace.tokens for trace in done)
    spent_s = max((t.last_s for t in done), default=0.0) - min((t.started_s for t in done), default=0.0)
    return Figures(
        requests=len(traces),
        left=sum(trace.left for trace in traces),
        errors=dict(Counter(trace.error for trace in traces if trace.error)),
        prompt_tokens=statistics.median(prompts) if prompts else None,
        answer_tokens=tokens,
        first_token_ms=Spread.of([trace.first_s - trace.started_s for trace in done]),
        gap_ms=Spread.of([gap for trace in done for gap in trace.gaps_s()]),
        stream_tokens_per_s=statistics.median(rates) if rates else None,
        together_tokens_per_s=_rate_together(done),
        busy_s=_busy_s(done),
        all_tokens_per_s=tokens / spent_s if spent_s > 0 else None,
        server_ms=_medians([trace.server_ms for trace in done]),
    )


def intrusion(alone: Trace, intruder: Trace, others: Sequence[Trace]) -> Intrusion | None:
    """None where one of the two long prompts got no answer: `figures` of them says why."""
    if not (alone.finished and intruder.finished):
        return None
    alone_s, among_s = alone.first_s - alone.started_s, intruder.first_s - intruder.started_s
    gaps = [gap for trace in others for gap in trace.gaps_s(intruder.started_s, intruder.first_s)]
    return Intrusion(
        prompt_tokens=intruder.prompt_tokens,
        alone_ms=alone_s * 1000,
        among_ms=among_s * 1000,
        ratio=among_s / alone_s,
        gap_meanwhile_ms=Spread.of(gaps),
        still_running=sum(trace.finished and trace.last_s >= intruder.first_s for trace in others),
    )


def show(found: Figures, disturbed: Intrusion | None, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _rows(found) + (_intrusion_rows(disturbed) if disturbed else []):
        table.add_row(name, value)
    console.print(table)
    for text, count in found.errors.items():
        console.print(f"{count} × {text}", markup=False, highlight=False)


def as_json(found: Figures, disturbed: Intrusion | None) -> str:
    """One object; the intrusion's figures under `intrusion`."""
    return msgspec.json.encode({**asdict(found), "intrusion": disturbed}).decode()


def _busy_s(done: Sequence[Trace]) -> float:
    spent_s = until_s = 0.0
    for trace in sorted(done, key=lambda trace: trace.started_s):
        spent_s += max(0.0, trace.last_s - max(trace.started_s, until_s))
        until_s = max(until_s, trace.last_s)
    return spent_s


def _rate_together(done: Sequence[Trace]) -> float | None:
    begin_s = max((trace.first_s for trace in done), default=math.inf)
    end_s = min((trace.last_s for trace in done), default=-math.inf)
    rates = [trace.rate_between(begin_s, end_s) for trace in done]
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known and len(known) == len(rates) else None


def _percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank: a value that was measured."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.median(row[name] for row in rows if name in row) for name in names}


def _rows(found: Figures) -> list[tuple[str, str]]:
    hung_up = f", {found.left} left early" if found.left else ""
    rows = [
        ("requests", f"{found.requests}, {sum(found.errors.values())} failed{hung_up}"),
        ("prompt", f"{found.prompt_tokens:.0f} tokens" if found.prompt_tokens is not None else ""),
        ("answers", f"{found.answer_tokens} tokens in all"),
        ("time to first token", _spread(found.first_token_ms)),
        ("gap between tokens", _spread(found.gap_ms)),
        ("a stream", _rate(found.stream_tokens_per_s)),
        ("all streams together", _rate(found.together_tokens_per_s)),
        ("whole run", _rate(found.all_tokens_per_s)),
        ("busy", f"{found.busy_s:.1f} s"),
        ("server says", ", ".join(f"{name} {value:.1f} ms" for name, value in found.server_ms.items())),
    ]
    return [(name, value) for name, value in rows if value]


def _intrusion_rows(disturbed: Intrusion) -> list[tuple[str, str]]:
    return [
        ("intruder", f"{disturbed.prompt_tokens} tokens; {disturbed.still_running} streams outlasted its first token"),
        (
            "its first token",
            f"{disturbed.among_ms:.0f} ms, alone {disturbed.alone_ms:.0f} ms, ratio {disturbed.ratio:.2f}",
        ),
        ("gap meanwhile", _spread(disturbed.gap_meanwhile_ms)),
    ]


def _spread(spread: Spread | None) -> str:
    return f"p50 {spread.p50:.1f} ms, p99 {spread.p99:.1f} ms, longest {spread.longest:.1f} ms" if spread else ""


def _rate(per_s: float | None) -> str:
    return f"{per_s:.1f} tokens/s" if per_s is not None else ""
