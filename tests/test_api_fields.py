"""A wrong body gets a 400 that names the field, its type and its range; nothing gets a traceback or a default."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes import House, build_house, ok, refused, turns


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


WRONG_OPTIONS = [
    ("num_ctx", 15, "a whole number from 16 to 4194304, not 15"),
    ("num_ctx", 1 << 24, "from 16 to 4194304"),
    ("num_ctx", "4096", "a whole number from 16 to 4194304, not '4096'"),
    ("num_predict", 1.5, "a whole number from -2 to"),
    ("num_keep", -9, "from -1 to"),
    ("num_batch", -1, "from 1 to 8192, not -1"),
    ("num_batch", 8193, "from 1 to 8192"),
    ("num_thread", 513, "from 0 to 512"),
    ("num_gpu", -2, "from -1 to 1024"),
    ("repeat_last_n", 2**31 - 1, "from -1 to 1048576"),
    ("top_k", True, "a whole number from -1 to 1048576, not true"),
    ("seed", 2**64, "a whole number from"),
    ("temperature", "hot", "a number from 0 to 100, not 'hot'"),
    ("temperature", -0.1, "a number from 0 to 100, not -0.1"),
    ("temperature", [1], "not a list"),
    ("top_p", 1.01, "a number from 0 to 1"),
    ("min_p", -1, "a number from 0 to 1"),
    ("typical_p", 2, "a number from 0 to 1"),
    ("repeat_penalty", 0, "a number from 0.1 to 10"),
    ("presence_penalty", 11, "a number from -10 to 10"),
    ("frequency_penalty", {}, "not an object"),
    ("use_mmap", 1, "true or false, not 1"),
    (
        "stop",
        7,
        "a string of at most 1000 characters or a list of at most 64 strings of at most 1000 characters, not 7",
    ),
    ("stop", [7], "a list of at most 64 strings"),
    ("stop", "x" * 1001, "a string of at most 1000 characters"),
    ("stop", ["x" * 1001], "strings of at most 1000 characters"),
    ("stop", ["x"] * 65, "at most 64 strings"),
]


@pytest.mark.parametrize(("option", "value", "words"), WRONG_OPTIONS)
def test_a_wrong_option_is_named_with_its_type_and_range(house: House, option: str, value: object, words: str) -> None:
    sentence = refused(house.chat("Hi", options={option: value}), 400)
    assert f"'options.{option}' must be" in sentence
    assert words in sentence


WRONG_FIELDS = [
    ({"messages": "Hi"}, "'messages' must be a list of objects, not 'Hi'"),
    ({"messages": ["Hi"]}, "'messages[0]' must be an object, not 'Hi'"),
    ({"messages": [{"content": "Hi"}]}, "'messages[0].role' is missing"),
    ({"messages": [{"role": "human", "content": "Hi"}]}, "'messages[0].role' must be one of assistant, developer, "),
    ({"messages": [{"role": "user"}]}, "'messages[0].content' is missing"),
    ({"messages": [{"role": "user", "content": 7}]}, "'messages[0].content' must be a string or a list of objects"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "'messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'messages[0].content[0].type'"),
    ({"messages": [{"role": "user", "content": "Hi", "images": ["aGk="]}]}, "'messages[0].images' is not supported"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "'messages[0].tool_calls' is not supported"),
    ({"stream": "yes"}, "'stream' must be true or false, not 'yes'"),
    ({"truncate": 0}, "'truncate' must be true or false"),
    ({"progress": "yes"}, "'progress' must be true or false, not 'yes'"),
    ({"progress": 1}, "'progress' must be true or false, not 1"),
    ({"shift": 1}, "'shift' must be true or false, not 1"),
    ({"options": []}, "'options' must be an object, not a list"),
    ({"keep_alive": "soon"}, "'keep_alive' must be a number of seconds or a duration"),
    ({"keep_alive": True}, "'keep_alive' must be"),
    ({"keep_alive": "1" * 100_000}, "'keep_alive' must be"),
    ({"model": 7}, "'model' must be a string, not 7"),
    ({"model": ""}, "'model' is missing"),
    ({"model": None}, "'model' is missing"),
    ({"model": "../etc/passwd"}, "'../etc/passwd' is not a name"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG_FIELDS)
def test_a_wrong_field_is_named(house: House, fields: dict[str, object], words: str) -> None:
    assert words in refused(house.chat("Hi", **fields), 400)


WRONG_IN_GENERATE = [
    ({"prompt": 7}, "'prompt' must be a string"),
    ({"progress": []}, "'progress' must be true or false, not a list"),
    ({"raw": True, "system": "x"}, "'raw' takes the prompt as it is"),
    ({"raw": "yes"}, "'raw' must be true or false"),
    ({"shift": "yes"}, "'shift' must be true or false"),
    ({"suffix": "x"}, "'suffix' is not supported"),
    ({"images": ["aGk="]}, "'images' is not supported"),
    ({"context": [1, 2]}, "'context' is not supported"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG_IN_GENERATE)
def test_a_wrong_field_of_generate_is_named(house: House, fields: dict[str, object], words: str) -> None:
    assert words in refused(house.post("/api/generate", **{"model": "toy", "prompt": "Hi", **fields}), 400)


WRONG_IN_OPENAI = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": "many"}, "max_completion_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"num_ctx": 1}, "num_ctx"),
    ({"stop": 7}, "stop"),
    ({"stream_options": []}, "stream_options"),
    ({"progress": "yes"}, "progress"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"n": 2}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"logprobs": True}, "logprobs"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_IN_OPENAI)
def test_openai_errors_name_the_field_in_param(house: House, fields: dict[str, object], param: str) -> None:
    response = house.complete("Hi", **fields)
    assert response.status_code == 400
    error = response.get_json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert f"'{param}'" in error["message"]


NOT_BUILT = ["tools", "format", "think", "logprobs", "top_logprobs"]


@pytest.mark.parametrize("field", NOT_BUILT)
def test_what_is_not_built_is_refused_by_name(house: House, field: str) -> None:
    value = {"tools": [{}], "format": "json", "top_logprobs": 3}.get(field, True)
    assert f"'{field}' is not supported yet" in refused(house.chat("Hi", **{field: value}), 400)


@pytest.mark.parametrize("nothing", [None, False, [], "", {}, 0])
def test_asking_for_nothing_of_it_is_accepted(house: House, nothing: object) -> None:
    ok(house.chat("Hi", **dict.fromkeys(NOT_BUILT, nothing)))


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "logit_bias": {}},
        {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "auto"},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "unheard_of": 1},
    ],
)
def test_openai_clients_may_spell_out_their_defaults(house: House, fields: dict[str, object]) -> None:
    ok(house.complete("Hi", **fields))


def test_unknown_fields_and_nulls_are_ignored(house: House) -> None:
    ok(house.chat("Hi", unheard_of={"a": 1}, stream=None, options={"top_k": None}, keep_alive=None))


MALFORMED = [
    b"{",
    b"[]",
    b'"text"',
    b"7",
    b"null",
    b"{} x",
    b'{"model": NaN}',
    b'{"model": Infinity}',
    b'{"options": {"temperature": 1e999}}',
    b'{"options": {"seed": ' + b"9" * 5000 + b"}}",
    b'{"model": "\\ud800"}',
    b'{"model": "\xed\xa0\x80"}',
    b'{"model": "\xff"}',
    b'{"model": "a\nb"}',
    b'{"a":' * 100_000,
    b"[" * 200_000 + b"]" * 200_000,
    b'{"x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "{}".encode("utf-16"),
    b"model=toy&messages=Hi",
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_a_body_that_is_no_strict_json_object_is_a_400(house: House, body: bytes) -> None:
    assert refused(house.send("/api/chat", body), 400).startswith("The body ")


@pytest.mark.parametrize(("depth", "status"), [(64, 200), (65, 400), (900, 400)])
def test_a_body_is_at_most_64_objects_and_lists_deep(house: House, depth: int, status: int) -> None:
    body = b'{"model": "toy", "unheard_of": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    response = house.send("/api/show", body)
    assert response.status_code == status
    assert status == 200 or "at most 64 lists and objects within each other" in refused(response, 400)


@pytest.mark.parametrize("option", ["temperature", "top_p", "top_k", "seed"])
@pytest.mark.parametrize("digits", [20, 309, 4000])
def test_a_number_of_many_digits_is_named_and_not_printed(house: House, option: str, digits: int) -> None:
    body = b'{"model": "toy", "messages": [], "options": {"%b": -%b}}' % (option.encode(), b"9" * digits)
    sentence = refused(house.send("/api/chat", body), 400)
    assert f"'options.{option}' must be" in sentence
    assert len(sentence) < 160


def test_messages_and_their_parts_are_counted(house: House) -> None:
    message, part = {"role": "user", "content": ""}, {"type": "text", "text": ""}
    ok(house.chat(messages=[{"role": "user", "content": [part] * 10_000}]))
    assert refused(house.chat(messages=[message] * 10_001), 400) == ("'messages' has 10001 items: send at most 10000.")
    sentence = refused(house.chat(messages=[{"role": "user", "content": [part] * 10_001}]), 400)
    assert "'messages[0].content' has 10001 items" in sentence


def test_an_integer_as_long_as_python_prints_is_a_400(house: House) -> None:
    body = b'{"model": "toy", "options": {"seed": ' + b"9" * 4300 + b"}}"
    assert "'options.seed' must be" in refused(house.send("/api/chat", body), 400)


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", "x/y"])
def test_the_content_type_does_not_matter(house: House, kind: str) -> None:
    response = house.send("/api/show", b'{"model": "toy"}', **{"Content-Type": kind})
    assert ok(response)["path"]


@pytest.mark.parametrize(
    "body", [b'\xef\xbb\xbf{"model":"toy"}', b'{\r\n"model":"toy"\r\n}\r\n', b' {"model":"toy"}\n']
)
def test_a_byte_order_mark_and_windows_lines_are_tolerated(house: House, body: bytes) -> None:
    ok(house.send("/api/show", body))


@pytest.mark.parametrize("body", [b"", b"  \r\n", b"{}", b"\xef\xbb\xbf"])
def test_an_empty_body_is_an_empty_object(house: House, body: bytes) -> None:
    assert "'model' is missing" in refused(house.send("/api/chat", body), 400)


def test_the_same_field_is_named_in_either_dialect(house: House) -> None:
    messages = [*turns("Hi", "Yes?"), {"role": "user", "content": 7}]
    assert "'messages[2].content'" in refused(house.chat(messages=messages), 400)
    assert house.complete(messages=messages).get_json()["error"]["param"] == "messages[2].content"
