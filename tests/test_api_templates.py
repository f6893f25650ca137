"""Templates that are bombs, through the whole application: each is a 400, and others are answered meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import gevent
import pytest

from rustllama.api.prompts import Prompts
from rustllama.api.renderer import Renderer
from tests.fakes import House, build_house, fake_record, ok, refused
from tests.test_api_renderer import SLOW_ON_DEMAND
from tests.test_template_helper import LOOP

PLAIN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def house(tmp_path: Path) -> House:
    """With models whose templates are strangers': `plain`, and `bomb`, which is one when it is asked `slow`."""
    built = build_house(tmp_path)
    for name, template in (("plain", PLAIN), ("bomb", SLOW_ON_DEMAND)):
        built.registry.put(fake_record(tmp_path / f"{name}.gguf", name, chat_template=template))
    return built


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (LOOP, "does not come to an end within 2 s"),
        ("{{ 'a' * 10 ** 11 }}", "needs too much memory"),
        ("{{ 'a' * 10 ** 7 }}", "more than the context can hold"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_bomb_of_a_request_is_a_400_with_a_sentence(house: House, template: str, sentence: str) -> None:
    body = {"model": "toy", "prompt": "Hi", "template": template}
    assert sentence in refused(house.post("/api/generate", **body), 400)
    assert ok(house.chat("Hi"))["done"]


def test_another_model_answers_while_a_model_bombs(house: House) -> None:
    ok(house.chat("Hi", model="bomb"))
    bombs = [gevent.spawn(house.chat, "slow", model="bomb") for _ in range(2)]
    gevent.idle()
    assert ok(house.chat("Hi", model="plain"))["done"]
    assert not all(bomb.ready() for bomb in bombs)
    gevent.joinall(bombs)
    assert ["within 2 s" in refused(bomb.get(), 400) for bomb in bombs] == [True, True]
    assert "2 times in a row" in refused(house.chat("Hi", model="bomb"), 400)


def test_a_helper_starts_with_the_load_and_is_there_when_the_model_is(house: House) -> None:
    before = children()
    house.post("/api/chat", model="plain")
    with gevent.Timeout(60):
        while children() == before:
            gevent.idle()
    assert ok(house.chat("Hi", model="plain"))["done"]
    assert len(children() - before) == 1


def test_a_killed_helper_costs_no_request(house: House) -> None:
    before = children()
    for _ in range(3):
        assert ok(house.chat("Hi", model="plain"))["done"]
        (helper,) = children() - before
        os.kill(helper, signal.SIGKILL)


def test_a_conversation_is_cut_by_turns_with_a_strangers_template_too(house: House) -> None:
    contents = [f"u{index} " * 10 for index in range(41)]
    reply = ok(house.chat(*contents, model="plain", options={"num_ctx": 128}))
    assert reply["truncated_messages"] > 0
    assert "u40" in house.engines.last.text


def test_a_shift_learns_from_a_strangers_template_how_turns_begin(house: House) -> None:
    ok(house.chat("Hi", "Yes?", "Why?", model="plain", shift=True))
    shift = house.engines.request.shift
    assert shift is not None
    assert shift.turns


def test_a_raw_prompt_starts_no_helper(house: House) -> None:
    before = children()
    ok(house.post("/api/generate", model="plain", prompt="Hi", raw=True))
    assert children() <= before


def test_prompts_start_nothing_by_themselves() -> None:
    before = children()
    Prompts(Renderer())
    assert children() <= before


def children() -> set[int]:
    """Processes that any thread of this one has started and not waited for."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}
