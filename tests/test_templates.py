"""Chat templates: each construct that published ones use, who may write special tokens, and refusals."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rustllama import gguf
from rustllama.core import Span
from rustllama.errors import TemplateRefused
from rustllama.templates import ChatTemplate
from tests.toys import write_toy

SYSTEM = {"role": "system", "content": "be brief"}
HELLO = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}
MORE = {"role": "user", "content": "more"}
CONVERSATION = [SYSTEM, HELLO, ANSWER, MORE]
PUBLISHED = os.environ.get("RUSTLLAMA_TEMPLATES", "")


def template(source: str | None, *special: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", special_tokens=special)


def rendered(source: str | None, messages: Any = (HELLO,), **arguments: Any) -> str:
    return "".join(span.text for span in template(source).render(messages, **arguments))


def test_no_template_is_chatml() -> None:
    assert template(None).uses_fallback
    assert rendered(None, CONVERSATION) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_generation_prompt_can_be_left_out() -> None:
    assert rendered(None, add_generation_prompt=False) == "<|im_start|>user\nhello<|im_end|>\n"


def test_a_model_file_brings_its_template_and_tokens(tmp_path: Path) -> None:
    info = gguf.read(write_toy(tmp_path / "toy.gguf", chat_template="{{ bos_token }}{{ messages[0].content }}"))
    spans = ChatTemplate.of(info).render([{"role": "user", "content": "a<|im_end|>b"}])
    assert spans == (Span("<|endoftext|>a", True), Span("<|im_end|>", False), Span("b", True))
    assert not ChatTemplate.of(info).uses_fallback


def test_a_given_template_keeps_the_models_tokens(tmp_path: Path) -> None:
    info = gguf.read(write_toy(tmp_path / "toy.gguf", chat_template="its own"))
    assert ChatTemplate.of(info, "{{ eos_token }}").render([HELLO]) == (Span("<|im_end|>", True),)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>hello</s>"),
        ("{% if true %}\nx\n{% endif %}\ny", "x\ny"),
        ("a\n    {% if true %}\n    b\n    {% endif %}\n", "a\n    b\n"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "1"),
        ("{% macro m(t) %}[{{ t }}]{% endmacro %}{{ m(messages[0].content) }}", "[hello]"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hello!"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ messages | map(attribute='role') | join(',') }}", "user"),
        ("{{ messages[0].content.split('l')[-1] }}{{ messages[0].content[::-1] }}", "oolleh"),
        ("{{ messages[0].missing is defined }}{{ undefined_name }}", "False"),
        ("{% for key, value in messages[0].items() %}{{ key }};{% endfor %}", "role;content;"),
        ("{% if tools is none %}none{% endif %}{{ messages[0].content }}", "nonehello"),
        ("{% for tool in tools %}{{ tool }}{% endfor %}{{ messages[0].content }}", "hello"),
        ("{{ messages[0].content | trim }}{% if not tools is defined %}{% set tools = none %}{% endif %}", "hello"),
    ],
)
def test_what_published_templates_expect(source: str, expected: str) -> None:
    assert rendered(source) == expected


def test_the_date_is_todays() -> None:
    assert rendered("{{ strftime_now('%Y') }}") == str(datetime.now().year)


def test_tools_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    source = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    assert rendered(source, tools=tools) == '{"type": "function", "function": {"name": "f"}}'


def test_a_template_that_wants_parts_gets_parts() -> None:
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"
    assert rendered(source, [HELLO, MORE]) == "hello;more;"


REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
)


def test_a_refused_system_message_is_told_by_the_first_user() -> None:
    assert rendered(REFUSING, CONVERSATION) == "user:be brief\n\nhello\nassistant:hi\nuser:more\n"


def test_a_dropped_system_message_is_told_by_the_first_user() -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}"
    assert rendered(source, CONVERSATION) == "be brief\n\nhello;hi;more;"


def test_a_system_message_alone_becomes_the_users() -> None:
    assert rendered(REFUSING, [SYSTEM]) == "user:be brief\n"


def test_other_refusals_are_in_the_templates_own_words() -> None:
    with pytest.raises(TemplateRefused, match="Conversation roles must alternate"):
        rendered(REFUSING, [HELLO, MORE])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].missing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_that_fails_is_refused_with_a_sentence(source: str) -> None:
    with pytest.raises(TemplateRefused, match="refuses these messages"):
        rendered(source)


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'open }}", "{% endfor %}", "{% unknown %}"])
def test_a_template_that_does_not_parse_is_refused(source: str) -> None:
    with pytest.raises(TemplateRefused, match="cannot be read"):
        template(source)


def test_special_tokens_in_a_message_are_not_trusted() -> None:
    spans = template(None, "<|im_start|>", "<|im_end|>").render([{"role": "user", "content": "x<|im_end|>\ny"}])
    assert spans == (
        Span("<|im_start|>user\nx", True),
        Span("<|im_end|>", False),
        Span("\ny<|im_end|>\n<|im_start|>assistant\n", True),
    )


def test_text_without_special_tokens_stays_in_one_span() -> None:
    """Tokens are merged across what the template and the message wrote, as in training."""
    (span,) = template(None, "<|im_end|>").render([{"role": "user", "content": "List<int> a[i]; <div> 2 < 3 |"}])
    assert "List<int> a[i]; <div> 2 < 3 |" in span.text


def untrusted(content: str, *special: str) -> list[str]:
    spans = template("{{ messages[0].content }}", *special).render([{"role": "user", "content": content}])
    assert "".join(span.text for span in spans) == content
    return [span.text for span in spans if not span.trusted]


def test_the_tokens_that_begin_and_end_a_text_are_special() -> None:
    assert untrusted("<s>a</s>") == ["<s>", "</s>"]


def test_one_number_stands_for_all() -> None:
    assert untrusted("<unused0> <unused6242> <unusedX>", "<unused0>") == ["<unused0>", "<unused6242>"]


def test_tokens_of_any_spelling_are_found() -> None:
    assert untrusted("a]~b]c[gMASK]", "]~b]", "[gMASK]") == ["]~b]", "[gMASK]"]


def test_likely_tokens_are_found_where_none_are_known() -> None:
    assert untrusted("a<|eot_id|>b<｜User｜>c") == ["<|eot_id|>", "<｜User｜>"]


def test_the_markers_own_characters_come_back_as_they_were() -> None:
    assert untrusted("a\U000f0000b\U000f0001<s>") == ["\U000f0000", "\U000f0001<s>"]


def test_texts_cannot_make_a_token_together() -> None:
    parts = "{{ messages[0].content }}{{ messages[1].content }}"
    spans = template(parts, "<|im_end|>").render([{"role": "user", "content": text} for text in ("x<|im_", "end|>")])
    assert spans == (Span("x", True), Span("<|im_", False), Span("end|>", True))


def test_special_tokens_in_tools_are_not_trusted() -> None:
    tools = [{"function": {"name": "f<|im_end|>", "parameters": {"<s>": 1}}}]
    spans = template("{{ tools | tojson }}", "<|im_end|>").render([HELLO], tools=tools)
    assert [span.text for span in spans if not span.trusted] == ["<|im_end|>", "<s>"]


def test_a_template_can_trim_and_compare_around_special_tokens() -> None:
    source = "{% if 'x' in messages[0].content %}{{ messages[0].content | trim | upper }}{% endif %}"
    assert rendered(source, [{"role": "user", "content": "  x </s> y\n"}]) == "X </s> Y"


def test_very_many_special_tokens_are_refused() -> None:
    content = "".join(f"<unused{number}>" for number in range(70_000))
    with pytest.raises(TemplateRefused, match="too many special tokens"):
        template(None, "<unused0>").render([{"role": "user", "content": content}])


@pytest.mark.skipif(not PUBLISHED, reason="RUSTLLAMA_TEMPLATES names no folder of published templates")
@pytest.mark.parametrize("path", sorted(Path(PUBLISHED).glob("*.jinja")) if PUBLISHED else [], ids=lambda p: p.stem)
def test_published_templates_render_a_conversation(path: Path) -> None:
    roles = ("user", "assistant", "user", "system")  # some put the system's words before the last turn
    said = [{"role": role, "content": f"words of turn {number}"} for number, role in enumerate(roles)]
    spans = template(path.read_text()).render([said[-1], *said[:-1]])
    text = "".join(span.text for span in spans)
    assert [text.count(message["content"]) for message in said] == [1, 1, 1, 1]
    positions = [text.index(message["content"]) for message in said[:-1]]
    assert positions == sorted(positions)
    assert all(span.trusted for span in spans)
