"""The figures: each worked out by hand on small traces."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rustllama.bench.dialects import Ollama, OpenAI
from rustllama.bench.player import Recording
from rustllama.bench.report import Spread, as_json, figures, intrusion, show
from rustllama.bench.trace import Trace
from rustllama.bench.wire import read


def _trace(started_s: float, *times: float, **fields: object) -> Trace:
    return Trace(started_s, tuple((when, 1) for when in times), **fields)  # type: ignore[arg-type]


def test_percentiles_are_values_that_were_measured() -> None:
    assert Spread.of([value / 1000 for value in range(1, 201)]) == pytest.approx(Spread(100, 198, 200))


def test_rates_of_two_streams_that_overlap() -> None:
    found = figures([_trace(0, 1, 2, 3, 4, 5), _trace(0, 3, 4, 5, 6)])
    assert found.stream_tokens_per_s == 1
    assert found.together_tokens_per_s == 2  # from 3 s to 5 s, where both run
    assert found.all_tokens_per_s == pytest.approx(9 / 6)


def test_the_rate_together_is_that_of_whole_steps() -> None:
    """The first stream ends with the first token of a step, and the others' tokens of it come later."""
    one, other = _trace(0, 1, 2, 3, 4), _trace(0, 2.01, 3.01, 4.01, 5.01)
    assert figures([one, other]).together_tokens_per_s == pytest.approx(2)
    assert figures([one, _trace(0, 3.5, 4.5)]).together_tokens_per_s is None, "there was no whole step"


def test_time_without_a_request_is_not_busy() -> None:
    assert figures([_trace(0, 1, 4), _trace(1, 2, 3), _trace(3, 5, 6), _trace(8, 9)]).busy_s == 7


def test_streams_that_never_ran_together_have_no_rate_together() -> None:
    assert figures([_trace(0, 1, 2), _trace(2, 3, 4)]).together_tokens_per_s is None


def test_tokens_that_come_in_one_piece_make_one_gap() -> None:
    found = figures([Trace(0, ((1, 1), (2, 3)))])
    assert found.answer_tokens == 4
    assert found.gap_ms == Spread(1000, 1000, 1000)


def test_the_servers_count_rules_where_tokens_had_no_text() -> None:
    found = figures([_trace(0, 1, 2, 3, answer_tokens=6)])
    assert found.answer_tokens == 6
    assert found.together_tokens_per_s == pytest.approx(2)  # six tokens over three arrivals, of which two in 2 s


def test_failed_and_left_answers_count_in_no_speed() -> None:
    found = figures([_trace(0, 1, 2), _trace(0, 1, 9, left=True), _trace(0, 9, error="gone")])
    assert (found.requests, found.left, found.errors, found.answer_tokens) == (3, 1, {"gone": 1}, 2)
    assert found.first_token_ms == Spread(1000, 1000, 1000)


def test_a_run_without_an_answer_has_no_figures_but_its_errors() -> None:
    found = figures([_trace(0, error="gone")])
    assert (found.first_token_ms, found.gap_ms, found.all_tokens_per_s) == (None, None, None)


def test_an_intrusion_compares_with_alone_and_looks_at_the_gaps_meanwhile() -> None:
    others = [_trace(0, 1, 2, 5, 6, 9)]
    found = intrusion(_trace(0, 2), _trace(2.5, 5.5), others)
    assert found
    assert (found.alone_ms, found.among_ms, found.ratio, found.still_running) == (2000, 3000, 1.5, 1)
    assert found.gap_meanwhile_ms == Spread(1000, 3000, 3000)  # 2 to 5 s, and 5 to 6 s


def test_an_intruder_that_failed_has_no_figures() -> None:
    assert intrusion(_trace(0, 1), _trace(0, error="gone"), []) is None


def test_a_line_counts_when_its_last_byte_came() -> None:
    line = b'{"message":{"content":"a"},"done":false}\n'
    pieces = [
        (1.0, b"HTTP/1.1 200 OK\r\nTransfer-"),
        (2.0, b"Encoding: chunked\r\n\r\n%x\r\n%b" % (len(line), line[:9])),
        (3.0, line[9:] + b"\r\n%x\r\n%b\r\n" % (len(line), line)),
        (4.0, b"e\r\n" + b'{"done":true}\n' + b"\r\n0\r\n\r\n"),
    ]
    trace = read(Recording(b"", started_s=0.5, pieces=pieces), Ollama())
    assert trace == Trace(0.5, ((3.0, 2),))


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"]
)
def test_what_is_not_http_is_an_error_and_no_crash(answer: bytes) -> None:
    assert "unreadable" in str(read(Recording(b"", pieces=[(1.0, answer)]), Ollama()).error)


def test_comments_and_other_fields_of_an_event_stream_are_passed_over() -> None:
    body = b': ping\nevent: x\ndata: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n'
    trace = read(Recording(b"", pieces=[(1.0, b"HTTP/1.1 200 OK\r\n\r\n" + body)]), OpenAI())
    assert trace == Trace(0.0, ((1.0, 1),))


def test_an_error_event_is_the_traces_error() -> None:
    body = b'data: {"error":{"message":"too long"}}\n\ndata: [DONE]\n\n'
    assert read(Recording(b"", pieces=[(1.0, b"HTTP/1.1 200 OK\r\n\r\n" + body)]), OpenAI()).error == "too long"


def test_the_table_tells_every_figure_and_json_the_same() -> None:
    found = figures([_trace(0, 1, 2, prompt_tokens=7), _trace(0, error="[b]gone")])
    disturbed = intrusion(_trace(0, 1), _trace(0, 2, prompt_tokens=9), [_trace(0, 1, 3)])
    out = io.StringIO()
    show(found, disturbed, Console(file=out, width=120))
    for words in ("7 tokens", "2, 1 failed", "p50 1000.0 ms", "1.0 tokens/s", "ratio 2.00", "1 × [b]gone"):
        assert words in out.getvalue()
    assert json.loads(as_json(found, disturbed))["intrusion"]["ratio"] == 2
