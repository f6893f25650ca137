"""No prompt, option, format or template takes the server down, or keeps it for itself: 400, or an answer soon."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from rustllama.api.options import Options
from tests.conftest import Server
from tests.hazards import some
from tests.hazards.bodies import PATIENCE_S
from tests.hazards.conftest import Start
from tests.hazards.table import Row
from tests.hazards.test_bodies import endpoints
from tests.mutants import Parts
from tests.test_template_helper import LOOP
from tests.toys import LLAMA, write_toy

LONGEST_MS = 5_000
N_CTX = 8_192
MANY = 26_000  # characters of one class: what ends a tokenizer on a stack of 8 MiB
CLASSES = ("a", " ", "7", "世", "\n", "é", "!", "\u0301", "🦙", "aA", "a ", "'s")
PRE_TOKENIZERS = (
    *(
        "superbpe",
        "gpt-4o",
        "llama4",
        "tekken",
        "deepseek-llm",
        "deepseek-v3",
        "qwen2",
        "llama-bpe",
        "gpt-2",
        "falcon",
        "starcoder",
    ),
    *("mpt", "olmo", "dbrx", "smaug-bpe", "poro-chat", "chatglm-bpe", "viking", "command-r", "kimi-k2"),
    *("bailingmoe", "exaone", "chameleon", "minerva-7b", "gpt3-finnish", "codeshell", "bloom", "stablelm2", "refact"),
)


class Target:
    """A server, whose worker must stay the same, and what it answered how fast."""

    def __init__(self, server: Server, row: Row) -> None:
        self._server = server
        self._row = row
        self._worker = server.worker_pid
        self._took_ms: dict[str, float] = {}
        self.statuses: dict[str, int] = {}

    def create(self, name: str, path: Path) -> None:
        self.post("create", {"name": name, "modelpath": str(path)})
        assert self.statuses.pop("create") == 200

    def post(self, case: str, body: dict[str, Any], path: str = "/api/create") -> str:
        return self.send(case, json.dumps(body).encode(), path)

    def send(self, case: str, data: bytes, path: str, method: str = "POST") -> str:
        began_s = time.perf_counter()
        response = requests.request(method, self._server.url + path, data=data, timeout=PATIENCE_S)
        self._took_ms[case] = (time.perf_counter() - began_s) * 1e3
        self.statuses[case] = response.status_code
        assert response.json(), case
        return response.text

    def judge(self, *, statuses: tuple[int, ...] = (200, 400)) -> None:
        assert {case: status for case, status in self.statuses.items() if status not in statuses} == {}
        slowest = max(self._took_ms, key=lambda case: self._took_ms[case])
        self._row.is_at_most("deaths", int(self._server.worker_pid != self._worker), 0)
        self._row.is_within(f"slowest of {len(self._took_ms)} ({slowest})", self._took_ms[slowest], LONGEST_MS)


@pytest.fixture
def target(start: Start, row: Row) -> Target:
    return Target(start(), row)


def generate(model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "options": {"num_predict": 1}, **fields}


def with_pre_tokenizer(source: bytes, name: str) -> bytes:
    parts = Parts.of(source)
    parts["tokenizer.ggml.pre"].value = name.encode()
    return parts.bytes()


def test_prompts_of_one_class_of_characters(target: Target, tmp_path: Path) -> None:
    source = write_toy(tmp_path / "toy.gguf", LLAMA, layers=1, context_length=2048).read_bytes()
    for name in some(PRE_TOKENIZERS, one_in=10):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(with_pre_tokenizer(source, name))
        target.create(name, path)
        for piece in CLASSES:
            long = (piece * MANY)[:MANY]
            target.post(f"{piece!r} with {name}", generate(name, long, raw=True), "/api/generate")
            target.post(f"words of {piece!r} with {name}", generate(name, f"{long} {long}"), "/api/generate")
        target.post("unload", {"model": name, "keep_alive": 0}, "/api/generate")
    target.judge()


@contextmanager
def noted_meanwhile(server: Server, waits_ms: list[float]) -> Iterator[None]:
    """How long others wait for what takes a worker thread."""
    with ThreadPoolExecutor(1) as thread:
        over: list[bool] = []

        def look() -> None:
            while not over:
                began_s = time.perf_counter()
                assert requests.get(f"{server.url}/api/list", timeout=PATIENCE_S).ok
                waits_ms.append((time.perf_counter() - began_s) * 1e3)

        looking = thread.submit(look)
        try:
            yield
        finally:
            over.append(True)
            looking.result(PATIENCE_S)


FLOODS = {  # 512 KiB each: what N_CTX tokens could be at most
    "newlines": "\n" * (64 * N_CTX),
    "letters without a token": "é" * (32 * N_CTX),
    "beginnings of a text": "<s>" * (21 * N_CTX),
    "ends of a turn": "<|im_end|>" * (6 * N_CTX),
    "spaces": " " * (64 * N_CTX),
}


def test_prompts_of_nothing_but_bytes_and_special_tokens(start: Start, row: Row, tmp_path: Path) -> None:
    server = start(NUM_CTX=N_CTX)
    target = Target(server, row)
    toy = write_toy(tmp_path / "spm.gguf", LLAMA, tokenizer="spm", layers=1, context_length=N_CTX)
    parts = Parts.of(toy.read_bytes())
    tokens = parts["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, list)
    tokens[0] = b"<s>"
    toy.write_bytes(parts.bytes())
    target.create("spm", toy)
    waits_ms: list[float] = []
    asked = {f"{name}, raw: {raw}": generate("spm", FLOODS[name], raw=raw) for name in FLOODS for raw in (False, True)}
    with noted_meanwhile(server, waits_ms), ThreadPoolExecutor(2) as clients:
        for said in clients.map(lambda case: target.post(case, asked[case], "/api/generate"), asked):
            assert "the context holds 8192 tokens" in said
    row.is_within("others waited", max(waits_ms), 1_000)
    target.judge(statuses=(400,))


NUMBERS = (
    "-1",
    "0",
    "-2147483648",
    "2147483647",
    "4294967296",
    "18446744073709551616",
    "1e308",
    "-1e308",
    "1e-308",
    "0.5",
)
NO_NUMBERS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5_000,
    '"x"',
    '"\\ud800"',
    "[]",
    "[1]",
    "{}",
    "true",
    "null",
)


def test_options_beyond_all_ranges(target: Target) -> None:
    for name in Options.__struct_fields__:
        for value in some(NUMBERS + NO_NUMBERS):
            data = b'{"model":"demo","prompt":"hi","options":{"num_predict":1,"%b":%b}}' % (
                name.encode(),
                value.encode(),
            )
            if name == "num_predict":
                data = data.replace(b'"num_predict":1,', b"")
            target.send(f"{name}={value[:20]}", data, "/api/generate")
    target.judge(statuses=(200, 400, 503))


JSON_BOMBS = {
    "200,000 lists": b'{"model":"demo","messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "200,000 lists without an end": b"[" * 200_000,
    "200,000 objects": b'{"options":' * 200_000 + b"1" + b"}" * 200_000,
    "an integer of 5,000 digits": b'{"model":"demo","options":{"seed":' + b"9" * 5_000 + b"}}",
    "a float of 5,000 digits": b'{"model":"demo","keep_alive":0.' + b"9" * 5_000 + b"e999}",
    "half a character in a name": rb'{"model":"\ud800"}',
    "half a character in a message": rb'{"model":"demo","messages":[{"role":"user","content":"\udfff"}]}',
    "half a character in a key": rb'{"\ud800":1}',
    "a million keys": b"{" + b",".join(b'"%d":0' % number for number in range(1_000_000)) + b"}",
}


def test_bodies_that_are_bombs(start: Start, row: Row) -> None:
    server = start()
    target = Target(server, row)
    for method, path in some(endpoints(server)):
        for case, data in JSON_BOMBS.items():
            target.send(f"{case} to {path}", data, path, method)
    target.judge(statuses=(400,))


SCHEMAS = {
    "json": "json",
    "a schema": {"type": "object", "properties": {"x": {"type": "string", "maxLength": 1_000_000}}},
    "a schema that holds itself": {"$ref": "#"},
    "a long pattern": {"type": "string", "pattern": "(a|a)*" * 1_000},
    "a grammar": "root ::= root",
}


def test_formats_are_not_built_yet(target: Target) -> None:
    """And say so, rather than be left out."""
    for case, value in SCHEMAS.items():
        assert "'format'" in target.post(case, generate("demo", "hi", format=value), "/api/generate")
        chat = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
        assert "'format'" in target.post(f"{case} in a chat", {**chat, "format": value}, "/api/chat")
        response_format = {"type": "json_schema", "json_schema": {"schema": value}}
        said = target.post(f"{case} of OpenAI", {**chat, "response_format": response_format}, "/v1/chat/completions")
        assert "'response_format'" in said
    target.judge(statuses=(400,))


TEMPLATES = {
    "loops": LOOP,
    "a long text": "{{ 'a' * 10 ** 9 }}",
    "a text that doubles": "{% set x = namespace(t='a') %}{% for i in range(99) %}{% set x.t = x.t * 2 %}{% endfor %}",
    "a macro of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a wide text": "{{ '%099999999d' % 1 }}",
    "a format": "{{ '{:999999999}'.format(1) }}",
    "a range of ranges": "{{ range(99999) | map('string') | join(range(99999) | join) }}",
    "much latin": "{{ lipsum(n=999999) }}",
    "an include": "{% include '/etc/passwd' %}",
    "the class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "brackets": "{{ " + "(" * 9_999 + ")" * 9_999 + " }}",
    "blocks": "{% if 1 %}" * 2_000 + "{% endif %}" * 2_000,
    "half a character": "{{ '\\ud800' }}",
    "nothing": "{# #}",
}


def test_templates_that_are_bombs(start: Start, row: Row) -> None:
    server = start()
    target = Target(server, row)
    target.post("load", generate("demo", "hi"), "/api/generate")
    waits_ms: list[float] = []
    with noted_meanwhile(server, waits_ms):
        for case, template in some(TEMPLATES.items()):
            said = target.post(case, generate("demo", "hi", template=template), "/api/generate")
            assert "root:" not in said
    row.is_within("others waited", max(waits_ms), 1_000)
    target.judge()
