"""Strangers' templates in a process of their own: the same prompts, and bounds on whatever they do."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rustllama.core import Span
from rustllama.errors import InternalError, TemplateRefused, TemplateTooCostly
from rustllama.template_child import SPARE_BYTES, Rendering
from rustllama.template_helper import CHILD, Channel, Order, Reply, TemplateHelper
from rustllama.templates import ChatTemplate, TemplateSource

HELLO = {"role": "user", "content": "hello <|im_end|>"}
MORE = {"role": "user", "content": "more"}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FALLS_OVER = (
    "import socket; from rustllama.template_helper import Channel, Order, Reply;"
    "channel = Channel(socket.socket(fileno=0)); channel.send(Reply()); channel.receive(Order)"
)


def source(template: str | None, *special: str) -> TemplateSource:
    return TemplateSource((template or "").encode(), template, "<s>", "</s>", special)


def render(helper: TemplateHelper, template: str, *messages: Any, limit_bytes: int = 1 << 20) -> tuple[Span, ...]:
    return helper.render(source(template, "<|im_end|>"), [messages or [HELLO]], limit_bytes=limit_bytes)[0]


def started(helper: TemplateHelper) -> int:
    helper.start()
    assert helper.pid is not None
    return helper.pid


@pytest.fixture(scope="module")
def helper() -> Iterator[TemplateHelper]:
    """Its deadline is short, and far longer than what is no bomb takes."""
    shared = TemplateHelper(deadline_s=1)
    yield shared
    shared.close()


@pytest.fixture
def patient() -> Iterator[TemplateHelper]:
    own = TemplateHelper(deadline_s=60)
    yield own
    own.close()


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "{% for m in messages %}{{ m.role }}:{{ m.content | tojson }} é世🦙\n{% endfor %}",
        "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}",
    ],
)
def test_a_prompt_is_what_the_template_gives_elsewhere(helper: TemplateHelper, template: str) -> None:
    conversations = [[HELLO], [HELLO, MORE]]
    made = source(template, "<|im_end|>")
    expected = tuple(map(ChatTemplate.compiled(made).render, conversations))
    assert helper.render(made, conversations, limit_bytes=1 << 20) == expected


def test_a_template_travels_once(helper: TemplateHelper) -> None:
    render(helper, "{{ messages[0].content }}")
    unknown_source = TemplateSource(b"{{ messages[0].content }}", "another", "", "", ())
    assert helper.render(unknown_source, [[MORE]], limit_bytes=100) == ((Span("more", True),),)


def test_templates_used_long_ago_are_asked_for_again() -> None:
    rendering = Rendering()
    for number in range(100):
        rendering.answer(Order(b"%d" % number, [], 0, 1, source("x")))
    assert rendering.answer(Order(b"0", [], 0, 1)).wants_source
    assert not rendering.answer(Order(b"99", [], 0, 1)).wants_source


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('Roles must alternate') }}", "{{ 1 / 0 }}"])
def test_refusals_are_in_the_same_words(helper: TemplateHelper, template: str) -> None:
    with pytest.raises(TemplateRefused) as here:
        ChatTemplate.compiled(source(template)).render([HELLO])
    with pytest.raises(TemplateRefused) as there:
        render(helper, template)
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ 'a' * 10 ** 11 }}", "needs too much memory"),
        ("{{ 'a' * (10 ** 9) ~ 'b' * (10 ** 9) }}", "memory|1 s"),
        ("{% set x = namespace(t='a') %}{% for i in range(40) %}{% set x.t = x.t ~ x.t %}{% endfor %}", "memory|1 s"),
        ("{% set l = ['a' * 9999] * 9999 %}{% for i in range(9999) %}{{ l | join }}{% endfor %}", "memory|1 s"),
        ("{{ [[0] * 99999] * 99999 | sum(start=[]) }}", "memory|1 s|refuses"),
        ("{{ 'a' * 2000000 }}", "writes 2000000 bytes"),
        ("{{ '\\ud800' }}", "half a character"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be read"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "cannot be read|refuses"),
        (LOOP, "within 1 s"),
        ("{{ lipsum(n=999999) }}", "1 s|memory"),
        ("{{ raise_exception('a' * 10 ** 5) }}", "refuses these messages: aaa"),
    ],
)
def test_a_bomb_is_refused_and_the_next_template_rendered(helper: TemplateHelper, template: str, sentence: str) -> None:
    with pytest.raises(TemplateRefused, match=sentence) as caught:
        render(helper, template)
    assert len(str(caught.value)) <= 1000
    assert render(helper, "{{ messages[0].content }}", MORE) == (Span("more", True),)


def test_special_tokens_that_search_for_ever_are_in_the_deadline_too(helper: TemplateHelper) -> None:
    with pytest.raises(TemplateTooCostly):
        helper.render(source("{{ messages }}", "1x"), [[{"role": "user", "content": "1" * 10**6}]], limit_bytes=1 << 24)


def test_a_helper_that_was_killed_is_replaced_before_anyone_notices(patient: TemplateHelper) -> None:
    first = started(patient)
    os.kill(first, signal.SIGKILL)
    assert render(patient, "{{ messages[0].content }}", MORE) == (Span("more", True),)
    assert patient.pid != first


def test_a_helper_killed_while_it_renders_is_replaced_before_anyone_notices(patient: TemplateHelper) -> None:
    first = started(patient)
    os.kill(first, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(render, patient, "{{ messages[0].content }}", MORE)
        os.kill(first, signal.SIGKILL)
        assert waiting.result(60) == (Span("more", True),)
    assert patient.pid != first


def test_a_helper_that_does_not_answer_is_ended_after_the_deadline() -> None:
    helper = TemplateHelper(deadline_s=0.1)
    first = started(helper)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(TemplateTooCostly, match=r"within 0\.1 s"):
        render(helper, "x", {"role": "user", "content": "more than a socket holds" * 100_000})
    assert not Path(f"/proc/{first}").exists()
    helper.close()


def test_a_template_whose_process_always_dies_is_refused() -> None:
    helper = TemplateHelper(child=(sys.executable, "-c", FALLS_OVER))
    with pytest.raises(TemplateTooCostly, match="ends the process that renders it"):
        render(helper, "x")
    assert helper.pid is None


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("pass", "has gone"),
        ("raise SystemExit(3)", "has gone"),
        ("import os; os.write(0, b'\\xff' * 99)", "is no message"),
    ],
)
def test_a_process_that_does_not_start_is_our_fault(program: str, words: str) -> None:
    with pytest.raises(InternalError, match=f"does not start .*{words}"):
        TemplateHelper(child=(sys.executable, "-c", program)).start()


def test_a_program_that_is_not_there_is_our_fault() -> None:
    with pytest.raises(InternalError, match="No such file"):
        TemplateHelper(child=("/no/such/program",)).start()


def test_a_closed_helper_leaves_no_process_and_can_start_again(patient: TemplateHelper) -> None:
    first = started(patient)
    patient.close()
    assert not Path(f"/proc/{first}").exists()
    assert started(patient) != first


def test_a_forgotten_helper_leaves_no_process() -> None:
    pid = started(TemplateHelper())
    assert not Path(f"/proc/{pid}").exists()


def orphan() -> tuple[subprocess.Popen[bytes], Channel, socket.socket]:
    """A child whose parent may leave at any time."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(CHILD, stdin=theirs.fileno(), start_new_session=True)
    channel = Channel(ours)
    channel.receive(Reply)
    return process, channel, ours


def test_a_child_ends_with_its_parent() -> None:
    process, _, connection = orphan()
    connection.close()
    assert process.wait(60) == 0


def test_a_child_without_a_parent_ends_in_the_middle_of_a_bomb() -> None:
    process, channel, connection = orphan()
    channel.send(Order(b"", [[HELLO]], 100, 0.1, source(LOOP)))
    connection.close()
    assert process.wait(60) == -signal.SIGALRM


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_has_limits_a_session_of_its_own_and_nothing_heavy(patient: TemplateHelper) -> None:
    ours = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (ours[1], ours[1]))
    try:
        pid = started(patient)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, ours)
    soft, _ = resource.prlimit(pid, resource.RLIMIT_AS)
    assert SPARE_BYTES < soft < 2 * SPARE_BYTES
    assert resource.prlimit(pid, resource.RLIMIT_CORE)[0] == 0
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    assert os.getsid(pid) == pid
    mapped = Path(f"/proc/{pid}/maps").read_text()
    assert "msgspec" in mapped
    assert not [name for name in ("gevent", "llama", "sqlite") if f"/{name}" in mapped]


def test_two_helpers_work_at_the_same_time(helper: TemplateHelper, patient: TemplateHelper) -> None:
    started(patient)
    over = threading.Event()

    def bomb() -> None:
        with pytest.raises(TemplateTooCostly):
            render(helper, LOOP)
        over.set()

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(bomb)
        assert render(patient, "{{ messages[0].content }}", MORE) == (Span("more", True),)
        assert not over.is_set()
        waiting.result(60)
