"""`GET /metrics`: what the engines do and have done, as Prometheus reads it.

Nothing here counts: a scrape turns the states of the loaded models and the numbers of `engine.tally` into metrics.
A new number is a row of a table below.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from rustllama import __version__
from rustllama.core import EngineState
from rustllama.engine.manager import EngineFactory, EngineManager
from rustllama.engine.prefix_store import StoreState
from rustllama.engine.tally import Histogram, ModelTally, Source, Unloaded

_NS_PER_S = 1_000_000_000

Numbers = Mapping[tuple[str, ...], float]
"""By the values of labels."""

_STATES: tuple[tuple[str, str, Callable[[EngineState], int]], ...] = (
    ("queued_requests", "Requests that wait for a slot.", lambda state: state.queued),
    ("running_requests", "Requests that have a slot.", lambda state: state.running),
    ("slots", "Requests that can have a slot at once.", lambda state: state.slots),
    ("kv_cache_cells", "Tokens that the slots can hold.", lambda state: state.cells),
    ("kv_cache_used_cells", "Tokens that the slots hold.", lambda state: state.cells_used),
    ("model_memory_bytes", "Memory of weights, KV cache and buffers.", lambda state: state.size_bytes),
    ("unmeasured_decode_calls", "Sizes of decode calls to be measured in a rest.", lambda state: state.unmeasured),
)
_TOTALS: tuple[tuple[str, str, tuple[str, ...], Callable[[ModelTally], Numbers]], ...] = (
    (
        "prompts",
        "Prompts that got their first token, by where their beginning came from.",
        ("source",),
        lambda tally: {(source.value,): tally.prompts[source] for source in Source},
    ),
    (
        "prompt_tokens",
        "Tokens of prompts, by where they came from: what was not computed was reused.",
        ("source",),
        lambda tally: {(source.value,): tally.prompt_tokens[source] for source in Source},
    ),
    ("answer_tokens", "Tokens generated.", (), lambda tally: {(): tally.answer_tokens}),
    (
        "compute_seconds",
        "Time in llama.cpp's calls: for tokens of answers, or of prompts.",
        ("work",),
        lambda tally: {("decode",): tally.decode_ns / _NS_PER_S, ("prompt",): tally.prompt_ns / _NS_PER_S},
    ),
    (
        "draft_tokens",
        "Tokens drafted from what was said before; accepted ones are among the tokens generated.",
        ("result",),
        lambda tally: {("accepted",): tally.drafts_accepted, ("rejected",): tally.drafts_rejected},
    ),
    ("model_load_failures", "Loads that failed.", (), lambda tally: {(): tally.failed_loads}),
    (
        "model_unloads",
        "Models that left memory, by why.",
        ("reason",),
        lambda tally: {(why.value,): tally.unloads[why] for why in Unloaded},
    ),
)
_DURATIONS: tuple[tuple[str, str, Callable[[ModelTally], Histogram]], ...] = (
    ("queue_seconds", "From a request's arrival at the loaded model to its slot.", lambda tally: tally.queue),
    ("first_token_seconds", "From a request's start to its first token, loading too.", lambda tally: tally.first_token),
    ("token_gap_seconds", "Between tokens of an answer, but for drafts that came true.", lambda tally: tally.gaps),
    ("model_load_seconds", "Loading of a model.", lambda tally: tally.loads),
)
_STORES: tuple[tuple[str, str, Callable[[StoreState], int]], ...] = (
    ("prompt_store_limit_bytes", "What computed prompts may take.", lambda store: store.limit_bytes),
    ("prompt_store_used_bytes", "What computed prompts take.", lambda store: store.used_bytes),
    ("prompt_store_states", "Computed prompts that are kept.", lambda store: store.states),
    ("prompt_store_tokens", "Their tokens.", lambda store: store.tokens),
)


class Metrics:
    """One for an application, with a registry of its own."""

    def __init__(self, manager: EngineManager, engines: EngineFactory) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Numbers(manager, engines))
        ProcessCollector(registry=self._registry)

    def register(self, app: Flask) -> None:
        app.add_url_rule("/metrics", view_func=self.metrics, methods=["GET"])

    def metrics(self) -> Response:
        return Response(generate_latest(self._registry), content_type=CONTENT_TYPE_LATEST)


class _Numbers(Collector):
    """Asked in the hub, at each scrape."""

    def __init__(self, manager: EngineManager, engines: EngineFactory) -> None:
        self._manager = manager
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("rustllama_build", "The version that runs.", {"version": __version__})
        yield from self._states()
        yield from self._totals()
        yield from self._durations()
        yield from self._stores()
        yield self._requests()

    def _states(self) -> Iterator[Metric]:
        """Of the models that are loaded. A name has two of them while its file was replaced and answers still run."""
        states: defaultdict[str, list[EngineState]] = defaultdict(list)
        for loaded in self._manager.loaded():
            states[loaded.record.name].append(loaded.state)
        for name, text, read in _STATES:
            yield _gauge(name, text, "model", {(model,): sum(map(read, each)) for model, each in states.items()})
        yield _decode_calls(states)

    def _totals(self) -> Iterator[Metric]:
        models = self._engines.tally.models
        for name, text, labels, read in _TOTALS:
            numbers = {(model, *values): n for model, tally in models.items() for values, n in read(tally).items()}
            yield _counter(name, text, ("model", *labels), numbers)

    def _durations(self) -> Iterator[Metric]:
        for name, text, read in _DURATIONS:
            family = HistogramMetricFamily(f"rustllama_{name}", text, labels=("model",))
            for model, tally in self._engines.tally.models.items():
                histogram = read(tally)
                family.add_metric((model,), _buckets(histogram), histogram.sum_ns / _NS_PER_S)
            yield family

    def _stores(self) -> Iterator[Metric]:
        stores = self._engines.stores()
        for name, text, read in _STORES:
            yield _gauge(name, text, "place", {(store.place,): read(store) for store in stores})
        evicted: Numbers = {(store.place,): store.evicted for store in stores}
        yield _counter("prompt_store_evictions", "Computed prompts that left for others.", ("place",), evicted)

    def _requests(self) -> Metric:
        requests = self._engines.tally.requests
        numbers: Numbers = {(model, str(status), outcome): n for (model, status, outcome), n in requests.items()}
        return _counter("requests", "HTTP requests that ended, by how.", ("model", "status", "outcome"), numbers)


def _decode_calls(states: Mapping[str, list[EngineState]]) -> Metric:
    text = "What a decode call takes, by its rows: measured when the server rests, corrected by the calls themselves."
    family = GaugeMetricFamily("rustllama_decode_call_seconds", text, labels=("model", "rows"))
    for model, each in states.items():
        for rows, ms in enumerate(each[0].decode_ms):
            if ms:
                family.add_metric((model, str(rows)), ms / 1000)
    return family


def _gauge(name: str, text: str, label: str, numbers: Numbers) -> Metric:
    family = GaugeMetricFamily(f"rustllama_{name}", text, labels=(label,))
    for values, number in numbers.items():
        family.add_metric(values, number)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], numbers: Numbers) -> Metric:
    family = CounterMetricFamily(f"rustllama_{name}", text, labels=labels)
    for values, number in numbers.items():
        family.add_metric(values, number)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Prometheus's buckets count all that lies below their bound."""
    bounds = [*(str(bound / _NS_PER_S) for bound in histogram.bounds_ns), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
