"""The bare loop and the paired runs, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rustllama.bench import bench
from rustllama.bench.bare import BareLoop
from rustllama.bench.report import figures
from rustllama.settings import Settings
from tests.toys import write_toy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("bench") / "toy.gguf")


def test_the_bare_loop_answers_every_stream_step_by_step_and_again(model: Path) -> None:
    loop = BareLoop(model, Settings(num_batch=16, num_thread=1), streams=3, tokens=60)
    first, again = loop.run(40, 20), loop.run(40, 20)
    loop.close()
    for traces in (first, again):
        found = figures(traces)
        assert (found.requests, found.answer_tokens, found.prompt_tokens) == (3, 60, 40)
        assert found.together_tokens_per_s


def test_the_verb_runs_the_bare_loop_without_a_server(model: Path) -> None:
    lengths = ["--prompt-tokens", "16", "--answer-tokens", "8"]
    done = CliRunner(env={"RUSTLLAMA_NUM_THREAD": "1"}).invoke(
        bench, ["--bare", str(model), "-c", "2", *lengths, "--json"]
    )
    assert json.loads(done.output)["answer_tokens"] == 16


def test_paired_runs_print_each_ratio_and_their_median(model: Path) -> None:
    few = {"RUSTLLAMA_NUM_THREAD": "1", "RUSTLLAMA_SLOTS": "2"}
    lengths = ["--prompt-tokens", "64", "--answer-tokens", "500", "--pairs", "1"]
    done = CliRunner(env=few).invoke(bench, ["--compare", str(model), "-c", "2", *lengths, "--json"])
    found = json.loads(done.output)
    [pair] = found["together"]
    assert found["together_ratio"] == pytest.approx(pair["server"] / pair["bare"])
