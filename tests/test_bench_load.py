"""The load generator: what it sends, when, and what it makes of what comes back."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from rustllama.bench import bench
from rustllama.bench.load import LoadRun, Plan
from rustllama.bench.player import Address, Arrivals, Player, Recording
from rustllama.bench.prompts import PromptMaker
from rustllama.errors import BadRequest, ServerUnreachable, Unavailable
from tests.scripted import PATIENCE_S, Refusal, ollama_answer, openai_answer, serving


def _plan(url: str, **changes: Any) -> Plan:
    return Plan(url, seed=1, prompt_tokens=50, answer_tokens=4, **{"warmup": 0, **changes})


class Crowd:
    """A script that notes the prompts it got and the most answers that ran at a time."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.most = self._running = 0
        self._lock = threading.Lock()

    def __call__(self, body: dict[str, Any]) -> Iterator[bytes]:
        with self._lock:
            self.prompts.append(body["messages"][-1]["content"])
            self._running += 1
            self.most = max(self.most, self._running)
        yield from ollama_answer(body)
        with self._lock:
            self._running -= 1


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(("api", "script"), [("ollama", ollama_answer), ("openai", openai_answer)])
def test_every_dialect_and_framing_yields_the_tokens_and_counts(api: str, script: Any, chunked: bool) -> None:
    with serving(script, chunked=chunked) as url:
        found, _ = LoadRun(_plan(url, api=api, requests=3, concurrency=2)).measure()
    assert (found.requests, found.errors, found.answer_tokens, found.prompt_tokens) == (3, {}, 12, 50)
    assert found.first_token_ms
    assert found.all_tokens_per_s


def test_what_the_server_says_of_its_own_durations_is_in_the_figures() -> None:
    with serving(ollama_answer) as url:
        found, _ = LoadRun(_plan(url)).measure()
    assert found.server_ms == {"answer": 2.0}


def test_prompts_have_the_asked_length_and_no_two_begin_alike() -> None:
    crowd = Crowd()
    with serving(crowd) as url:
        LoadRun(_plan(url, requests=5, warmup=2)).measure()
    made = crowd.prompts[-7:]  # probes come first
    assert [len(prompt.split()) for prompt in made] == [40] * 7
    assert len({prompt[:20] for prompt in made}) == 7


def test_prompts_are_exact_where_some_letters_cost_more_than_others() -> None:
    def uneven(prompt: str) -> int:
        return 7 + sum(2 if word in "aeiou" else 1 for word in prompt.split())

    prompts = PromptMaker.calibrate(uneven, seed=3)
    assert [uneven(prompts.make(number, 500)) for number in range(5)] == [500] * 5


def test_a_shared_prefix_is_shared_and_counts_as_part_of_the_prompt() -> None:
    crowd = Crowd()
    with serving(crowd) as url:
        LoadRun(_plan(url, requests=2, shared_prefix=30)).measure()
    one, other = (prompt.split() for prompt in crowd.prompts[-2:])
    assert len(one) == len(other) == 40
    assert one[:30] == other[:30]
    assert one[30:] != other[30:]


def test_a_closed_loop_never_runs_more_requests_than_its_concurrency() -> None:
    crowd = Crowd()
    with serving(crowd) as url:
        LoadRun(_plan(url, requests=12, concurrency=3)).measure()
    assert len(crowd.prompts) >= 12
    assert crowd.most <= 3


def test_streams_run_at_the_same_time() -> None:
    barrier = threading.Barrier(4)

    def script(body: dict[str, Any]) -> Iterator[bytes]:
        if body["options"]["num_predict"] > 1:
            barrier.wait(PATIENCE_S)
        return ollama_answer(body)

    with serving(script) as url:
        found, _ = LoadRun(_plan(url, requests=4, concurrency=4)).measure()
    assert found.answer_tokens == 16


def test_a_rate_starts_requests_however_many_run() -> None:
    barrier = threading.Barrier(3)

    def script(body: dict[str, Any]) -> Iterator[bytes]:
        if body["options"]["num_predict"] > 1:
            barrier.wait(PATIENCE_S)
        return ollama_answer(body)

    with serving(script) as url:
        found, _ = LoadRun(_plan(url, requests=3, concurrency=1, rate=1000.0)).measure()
    assert found.errors == {}
    assert found.answer_tokens == 12


def test_the_intruder_comes_when_all_others_have_begun_and_none_has_ended() -> None:
    came = threading.Event()
    longs: list[str] = []

    def script(body: dict[str, Any]) -> Iterator[bytes]:
        lines = ollama_answer(body)
        if len(body["messages"][-1]["content"].split()) == 190:
            longs.append("alone" if not longs else "among")
            if len(longs) == 2:
                came.set()
        elif body["options"]["num_predict"] > 1:
            yield next(lines)
            assert came.wait(PATIENCE_S)
        yield from lines

    with serving(script) as url:
        found, disturbed = LoadRun(_plan(url, requests=2, concurrency=2, intrude=200)).measure()
    assert found.errors == {}
    assert disturbed
    assert disturbed.prompt_tokens == 200
    assert disturbed.ratio == pytest.approx(disturbed.among_ms / disturbed.alone_ms)


def test_readers_that_leave_are_counted_and_are_no_error() -> None:
    def endless(body: dict[str, Any]) -> Iterator[bytes]:
        yield from ollama_answer(body, 1 if body["options"]["num_predict"] == 1 else 100_000)

    with serving(endless) as url:
        found, _ = LoadRun(_plan(url, requests=2, concurrency=2, leave=2)).measure()
    assert (found.left, found.errors, found.answer_tokens) == (2, {}, 0)


def _after_the_probes(script: Any) -> Any:
    return lambda body: ollama_answer(body) if body["options"]["num_predict"] == 1 else script(body)


def _refuse(_: object) -> Iterator[bytes]:
    raise Refusal(503, b'{"error":"server busy"}')


def _fail_late(_: object) -> Iterator[bytes]:
    yield b'{"message":{"content":"a"},"done":false}\n'
    yield b'{"error":"the model died"}\n'


def _break_off(_: object) -> Iterator[bytes]:
    yield b'{"message":{"content":"a"},"done":false}\n'


def _babble(_: object) -> Iterator[bytes]:
    yield b"<html>\n"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (_refuse, "HTTP 503: server busy"),
        (_fail_late, "the model died"),
        (_break_off, "broke off"),
        (_babble, "unreadable answer"),
    ],
)
def test_a_failure_is_told_with_its_text_and_counted(script: Any, text: str) -> None:
    with serving(_after_the_probes(script)) as url:
        found, _ = LoadRun(_plan(url, requests=2)).measure()
    [(told, count)] = found.errors.items()
    assert text in told
    assert (count, found.answer_tokens) == (2, 0)


def test_an_error_in_openais_shape_gives_its_message() -> None:
    def refuse(_: object) -> Iterator[bytes]:
        raise Refusal(404, b'{"error":{"message":"model \'x\' not found","type":"not_found"}}')

    with serving(refuse) as url, pytest.raises(Unavailable, match="HTTP 404: model 'x' not found"):
        LoadRun(_plan(url, api="openai"))


def test_a_server_that_is_not_there_is_told_in_one_sentence() -> None:
    with serving(ollama_answer) as url:
        pass
    with pytest.raises(ServerUnreachable, match="No server answers"):
        LoadRun(_plan(url))


@pytest.mark.parametrize("url", ["https://localhost:1", "localhost:1", "http://"])
def test_an_address_that_cannot_be_used_is_named(url: str) -> None:
    with pytest.raises(BadRequest, match="http://host:port"):
        LoadRun(_plan(url))


def test_a_prompt_shorter_than_the_template_is_refused() -> None:
    with serving(ollama_answer) as url, pytest.raises(BadRequest, match="at least 11 tokens"):
        LoadRun(Plan(url, seed=1, prompt_tokens=5)).measure()


def test_a_server_that_falls_silent_is_given_up() -> None:
    recording = Recording(b"GET / HTTP/1.1\r\n\r\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address.find(*silent.getsockname())
        Player(address, silence_limit_s=0.01).play([recording], Arrivals())
    assert recording.failure == "no byte came for 0.01 s"


def test_a_server_that_counts_no_tokens_is_refused() -> None:
    def uncounted(_: object) -> Iterator[bytes]:
        yield b'{"message":{"content":"a"},"done":true}\n'

    with serving(uncounted) as url, pytest.raises(BadRequest, match="does not say how many tokens"):
        LoadRun(_plan(url))


def test_a_big_request_reaches_a_server_that_reads_late() -> None:
    with serving(ollama_answer) as url:
        found, _ = LoadRun(Plan(url, seed=1, prompt_tokens=2_000_000, answer_tokens=2, warmup=0)).measure()
    assert found.prompt_tokens == 2_000_000


def test_the_verb_prints_a_table_or_json_and_fails_with_its_requests() -> None:
    with serving(ollama_answer) as url:
        shown = CliRunner().invoke(bench, ["--url", url, "--answer-tokens", "3"])
        as_json = CliRunner().invoke(bench, ["--url", url, "-c", "2", "--json"])
    with serving(_after_the_probes(_refuse)) as url:
        failed = CliRunner().invoke(bench, ["--url", url])
    assert "time to first token" in shown.output
    assert json.loads(as_json.output)["requests"] == 2
    assert (shown.exit_code, as_json.exit_code, failed.exit_code) == (0, 0, 1)
    assert "server busy" in failed.output
