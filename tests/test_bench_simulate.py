"""The scheduler in virtual time: the same load gives the same figures, which say whether the policy keeps its word."""

from __future__ import annotations

import json
from functools import partial

import pytest
from click.testing import CliRunner

from rustllama.bench import bench
from rustllama.bench.load import Plan
from rustllama.bench.report import Figures, figures
from rustllama.bench.simulate import MACHINES, Simulation
from rustllama.errors import BadRequest
from rustllama.settings import Settings


def simulate(machine: str = "135m", *, settings: Settings = Settings(), **load: object) -> Figures:  # noqa: B008 - frozen
    plan = Plan(**{"url": "", "seed": 1, "concurrency": 16, "requests": 64, **load})  # type: ignore[arg-type]
    return figures(Simulation(plan, MACHINES[machine], settings).run())


def test_every_request_is_answered_whole() -> None:
    found = simulate(requests=100, rate=50.0, answer_tokens=5)
    assert (found.requests, found.answer_tokens, found.errors) == (100, 500, {})


def test_the_same_seed_gives_the_same_figures() -> None:
    assert simulate(rate=3.0) == simulate(rate=3.0)


@pytest.mark.parametrize("machine", ["135m", "1b"])
def test_streams_keep_their_gap_while_prompts_arrive(machine: str) -> None:
    """16 streams and more prompts than there is time for."""
    settings = Settings(gap_ms=200)
    found = simulate(machine, settings=settings, rate=20.0, requests=120, prompt_tokens=100, answer_tokens=100)
    target_ms = max(settings.gap_ms, 2 * MACHINES[machine].decode(16, 0))
    assert found.gap_ms is not None
    assert found.gap_ms.p99 <= 1.3 * target_ms
    assert found.gap_ms.longest <= 2 * target_ms


def test_a_shared_beginning_is_computed_once() -> None:
    load = partial(simulate, prompt_tokens=520, answer_tokens=32, shared_prefix=500)
    alone, together = load(requests=1), load(requests=16)
    assert alone.first_token_ms is not None
    assert together.first_token_ms is not None
    assert together.first_token_ms.p50 <= 2 * alone.first_token_ms.p50
    apart = load(requests=16, settings=Settings(prompt_cache_memory=0))
    assert apart.first_token_ms is not None
    assert apart.first_token_ms.p50 > 5 * alone.first_token_ms.p50


def test_a_full_queue_refuses_the_rest() -> None:
    found = simulate(settings=Settings(slots=2, max_queue=3), concurrency=10, requests=10)
    assert sum(found.errors.values()) == 5


def test_what_fits_no_slot_is_refused() -> None:
    with pytest.raises(BadRequest, match="RUSTLLAMA_NUM_CTX"):
        simulate(prompt_tokens=10_000)


def test_the_command_prints_the_usual_table() -> None:
    done = CliRunner().invoke(bench, ["--simulate", "gpu", "-c", "4", "--answer-tokens", "8", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["answer_tokens"] == 32
