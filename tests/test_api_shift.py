"""`shift`: what a full context may drop of a conversation, as the engine is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import requests

from rustllama.core import ContextShift
from rustllama.errors import Unsupported
from tests.conftest import Server
from tests.fakes import House, build_house, ok, refused, turns

SYSTEM = {"role": "system", "content": "Be brief."}
EXCHANGES = turns("one two", "three", "four", "five six", "seven", "eight", "nine ten")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


def chat(house: House, *messages: dict[str, str], **options: object) -> ContextShift:
    ok(house.chat(messages=list(messages), shift=True, options=options))
    shift = house.engines.request.shift
    assert shift is not None
    return shift


def words(house: House, start: int, end: int | None = None) -> str:
    """Tokens of the last prompt, as the fake engine counts them."""
    return " ".join(["BOS", *re.findall(r"\w+|[^\w\s]", house.engines.last.text)][start:end])


@pytest.mark.parametrize("fields", [{}, {"shift": None}, {"shift": False}])
def test_without_shift_a_full_context_ends_the_answer(house: House, fields: dict[str, object]) -> None:
    ok(house.chat("Hi", **fields))
    assert (house.engines.request.shift, house.engines.request.max_tokens) == (None, None)


def test_a_chat_keeps_its_system_message_and_drops_up_to_where_a_question_begins(house: House) -> None:
    shift = chat(house, SYSTEM, *EXCHANGES)
    assert words(house, 0, shift.keep).endswith("Be brief . < | im_end | > < | im_start | > user")
    assert [words(house, place, place + 1) for place in (shift.keep, *shift.turns)] == ["one", "four", "seven", "nine"]
    assert shift.question_end == len(house.engines.request.prompt)


def test_a_chat_without_a_system_message_keeps_how_its_first_question_begins(house: House) -> None:
    shift = chat(house, *EXCHANGES)
    assert words(house, 0, shift.keep) == "BOS < | im_start | > user"
    assert len(shift.turns) == 3


def test_a_model_that_takes_no_system_message_keeps_it_in_the_first_question(house: House) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template += "[{{ m.role }}]{{ m.content }}[end]{% endfor %}[assistant]"
    body = {"model": "toy", "prompt": "one two", "system": "Be brief.", "template": template}
    ok(house.post("/api/generate", **body, shift=True))
    shift = house.engines.request.shift
    assert shift is not None
    assert words(house, shift.keep, shift.keep + 2) == "one two"


def test_turns_that_were_left_out_are_no_turns(house: House) -> None:
    many = turns(*(f"word{i} " * 10 for i in range(40)), "nine ten")
    shift = chat(house, SYSTEM, *many, num_ctx=128)
    assert words(house, 0, shift.keep).count("system") == 1
    assert shift.turns[-1] < len(house.engines.request.prompt) < 128
    assert words(house, shift.turns[-1]).startswith("nine ten")


def test_num_keep_keeps_up_to_the_next_question_and_minus_one_all(house: House) -> None:
    turns_ = chat(house, SYSTEM, *EXCHANGES).turns
    assert chat(house, SYSTEM, *EXCHANGES, num_keep=turns_[0] + 1).keep == turns_[1]
    assert chat(house, SYSTEM, *EXCHANGES, num_keep=-1).keep == len(house.engines.request.prompt)


@pytest.mark.parametrize(("num_keep", "keep"), [(None, 4), (0, 0), (7, 7), (-1, 11), (99, 11)])
def test_a_raw_prompt_keeps_num_keep_tokens(house: House, num_keep: int | None, keep: int) -> None:
    body = {"model": "toy", "prompt": "word " * 10, "raw": True, "options": {"num_keep": num_keep}}
    ok(house.post("/api/generate", **body, shift=True))
    assert house.engines.request.shift == ContextShift(keep)


def test_an_answer_without_a_bound_gets_one(house: House) -> None:
    chat(house, *EXCHANGES, num_ctx=128)
    assert house.engines.request.max_tokens == 1280
    chat(house, *EXCHANGES, num_ctx=128, num_predict=5000)
    assert house.engines.request.max_tokens == 5000


def test_what_is_kept_must_leave_room(house: House) -> None:
    system = {"role": "system", "content": "word " * 90}
    sentence = refused(house.chat(messages=[system, *EXCHANGES], shift=True, options={"num_ctx": 128}), 400)
    assert "'shift' would keep 108 tokens" in sentence
    assert "128 tokens" in sentence


def test_a_model_that_cannot_shift_refuses(house: House) -> None:
    house.script.refusal = Unsupported("'shift' is not possible with this model.", "shift")
    assert refused(house.chat("Hi", shift=True), 400) == "'shift' is not possible with this model."


def test_the_bundled_model_ends_its_sentence_when_the_turn_before_has_left_its_context(server: Server) -> None:
    messages = [SYSTEM, *turns("hello", "Hello!", "why is the sky blue?")]

    def reply(num_ctx: int) -> dict[str, object]:
        body = {"model": "demo", "messages": messages, "options": {"num_ctx": num_ctx, "temperature": 0}}
        return dict(requests.post(server.url + "/api/chat", json={**body, "shift": True}, timeout=30).json())

    whole, shifted = reply(512), reply(52)
    assert (whole["warnings"], shifted["done_reason"]) == ([], "stop")
    assert shifted["warnings"] == ["15 tokens were dropped to go on in a context of 52"]
    assert shifted["message"] == whole["message"]
