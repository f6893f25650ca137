"""A conversation that outgrows its context: what is left out, where the cut lies, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rustllama.api.prompts import cut
from tests.fakes import House, build_house, ok, refused, turns

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


def words(count: int, word: str = "word") -> str:
    return " ".join([word] * count)


def conversation(exchanges: int, length: int = 10) -> list[dict[str, str]]:
    """Turns that tell their number, ending with the user's."""
    contents = [words(length, f"u{i // 2}" if i % 2 == 0 else f"a{i // 2}") for i in range(2 * exchanges)]
    return turns(*contents, "Now?")


def first_kept(house: House) -> str:
    """The first word that is not the system's."""
    return house.engines.last.text.split("user\n")[1].split()[0]


def test_what_fits_is_left_whole(house: House) -> None:
    reply = ok(house.chat(messages=conversation(3)))
    assert "truncated_messages" not in reply
    assert first_kept(house) == "u0"


def test_the_oldest_turns_go_and_the_system_message_and_the_last_one_stay(house: House) -> None:
    reply = ok(house.chat(messages=[SYSTEM, *conversation(20)], options={"num_ctx": 128}))
    text = house.engines.last.text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nu")
    assert text.endswith("<|im_start|>user\nNow?<|im_end|>\n<|im_start|>assistant\n")
    assert len(house.engines.request.prompt) < 128
    assert reply["truncated_messages"] == 2 * int(first_kept(house)[1:])


def test_a_cut_is_told_in_the_warnings(house: House) -> None:
    reply = ok(house.chat(messages=conversation(20), options={"num_ctx": 128}))
    assert f"the {reply['truncated_messages']} oldest messages of 41 were left out" in reply["warnings"][0]


def test_what_remains_begins_with_a_users_turn(house: House) -> None:
    messages = [{"role": "assistant", "content": words(200)}, *conversation(1), {"role": "user", "content": "And?"}]
    ok(house.chat(messages=messages, options={"num_ctx": 100}))
    assert first_kept(house) == "u0"


def test_a_system_message_in_the_middle_stays_too(house: House) -> None:
    messages = [*conversation(10), SYSTEM, {"role": "user", "content": "And?"}]
    ok(house.chat(messages=messages, options={"num_ctx": 64}))
    assert "Be brief." in house.engines.last.text


def test_the_cut_stays_where_it_is_for_several_turns(house: House) -> None:
    cuts = []
    for exchanges in range(20, 40):
        ok(house.chat(messages=[SYSTEM, *conversation(exchanges)], options={"num_ctx": 512}))
        cuts.append(int(first_kept(house)[1:]))
    assert cuts == sorted(cuts)
    assert len(set(cuts)) <= 8  # 20 exchanges of 44 tokens, in steps of 128
    assert len(house.engines.request.prompt) < 512


def test_a_last_message_that_alone_is_too_long_is_refused_with_both_counts(house: House) -> None:
    sentence = refused(house.chat("Hi", "Yes?", words(100), options={"num_ctx": 64}), 400)
    prompt = 1 + 100 + 3 * 5 + 2  # the token that begins a text, the words, three markers, two roles
    assert f"{prompt} tokens" in sentence
    assert "64 tokens" in sentence


def test_truncate_false_refuses_what_would_be_cut(house: House) -> None:
    sentence = refused(house.chat(messages=conversation(20), truncate=False, options={"num_ctx": 128}), 400)
    assert "128 tokens" in sentence


@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_of_generate_is_never_cut(house: House, raw: bool) -> None:
    body = {"model": "toy", "prompt": words(100), "raw": raw, "options": {"num_ctx": 64}}
    assert "64 tokens" in refused(house.post("/api/generate", **body), 400)


def test_a_prompt_that_leaves_room_for_one_token_is_taken(house: House) -> None:
    body = {"model": "toy", "raw": True, "options": {"num_ctx": 64}}
    ok(house.post("/api/generate", prompt=words(62), **body))  # and the one that begins a text
    refused(house.post("/api/generate", prompt=words(63), **body), 400)


def test_a_prompt_of_too_many_bytes_is_not_even_tokenized(house: House) -> None:
    house.post("/api/chat", model="toy")
    sentence = refused(house.chat("x" * 5000, options={"num_ctx": 64}), 400)
    assert "about 5064 bytes" in sentence
    assert "64 tokens" in sentence
    assert house.engines.last.prompts == []


def test_a_long_prompt_is_tokenized_only_where_it_may_fit(house: House) -> None:
    sentence = refused(house.chat("? " * 70_000), 400)
    assert sentence.startswith("The prompt has 700")
    (counted,) = house.engines.last.prompts
    assert max(len(span.text) for span in counted) == 4096
    ok(house.chat("x" * 140_000))  # a word


def test_a_prompt_that_its_template_makes_too_long_is_not_tokenized(house: House) -> None:
    template = "{% for _ in range(1000) %}{{ messages[0].content }}{% endfor %}"
    body = {"model": "toy", "prompt": "abcdefgh", "template": template, "options": {"num_ctx": 64}}
    assert "writes 8000 bytes" in refused(house.post("/api/generate", **body), 400)
    assert house.engines.last.prompts == []


def test_megabytes_of_old_turns_are_cut_before_they_are_tokenized(house: House) -> None:
    ok(house.chat(messages=conversation(500, 100), options={"num_ctx": 128}))
    sizes = [sum(len(span.text) for span in prompt) for prompt in house.engines.last.prompts]
    assert max(sizes) < 2 * 64 * 128


def test_a_flood_of_empty_turns_is_cut_before_it_is_rendered(house: House) -> None:
    reply = ok(house.chat(*[""] * 9_998, "Hi", options={"num_ctx": 128}))
    assert reply["truncated_messages"] > 9_900
    assert max(len(prompt) for prompt in house.engines.last.prompts) < 128


def test_a_long_conversation_is_not_tokenized_once_for_each_message(house: House) -> None:
    ok(house.chat(messages=conversation(200), options={"num_ctx": 2048}))
    assert len(house.engines.last.prompts) < 12


@pytest.mark.parametrize(
    ("limit", "step", "kept"),
    [(100, 10, 0), (99, 1, 1), (99, 10, 1), (99, 11, 2), (50, 10, 5), (45, 50, 9), (1, 25, 9)],
)
def test_a_cut_drops_whole_steps_and_keeps_the_last(limit: int, step: int, kept: int) -> None:
    assert cut(lambda start: 100 - 10 * start, range(10), limit, step) == kept
