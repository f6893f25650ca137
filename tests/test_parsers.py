"""What parses strangers' bytes and texts returns, or refuses in words of ours: nothing else gets out."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rustllama import gguf
from rustllama.api.decoding import parse_object, typed
from rustllama.api.hosts import Hosts
from rustllama.api.ollama import ChatBody, GenerateBody
from rustllama.api.openai import CompletionBody
from rustllama.api.options import Options, read_options
from rustllama.api.requests import keep_alive_s, model_name, read_messages
from rustllama.errors import BadModelFile, BadRequest, Forbidden, SettingError
from rustllama.settings import Settings, table
from tests.mutants import seeded
from tests.toys import write_toy

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGE = st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "images", "tool_calls"), JSON))
BODY = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("model", "stream", "prompt", "keep_alive", "max_tokens", "stream_options"), JSON),
        "messages": st.lists(MESSAGE | JSON, max_size=3) | JSON,
        "options": st.dictionaries(st.sampled_from(Options.__struct_fields__), JSON) | JSON,
    },
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_toy(tmp_path_factory.mktemp("parsers") / "toy.gguf", layers=1, vocabulary=264).read_bytes()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_json_object_or_a_bad_request(data: bytes) -> None:
    with suppress(BadRequest):
        assert isinstance(parse_object(data), dict)


@given(st.dictionaries(st.text(), JSON))
def test_what_python_writes_as_json_is_read_as_it_was(value: dict[str, Any]) -> None:
    with suppress(BadRequest):  # beyond 64 bits, or too deep
        assert parse_object(json.dumps(value).encode()) == value


@given(BODY)
def test_any_body_is_typed_or_a_bad_request(body: dict[str, Any]) -> None:
    for kind in (ChatBody, GenerateBody, CompletionBody, Options):
        with suppress(BadRequest):
            assert isinstance(typed(kind, body), kind)
    for read in (model_name, keep_alive_s):
        with suppress(BadRequest):
            read(body)
    with suppress(BadRequest):
        read_options(typed(ChatBody, body).options)
    with suppress(BadRequest):
        for turn in read_messages(typed(ChatBody, body).messages):
            assert {type(turn["role"]), type(turn["content"])} == {str}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(3_000, 1 << 30), cut=st.integers(0, 1 << 20))
def test_any_header_is_read_or_a_bad_model_file(toy: bytes, tmp_path: Path, seed: int, cut: int) -> None:
    path = tmp_path / "toy.gguf"
    path.write_bytes(seeded(toy, seed)[: len(toy) - cut if cut % 4 == 0 else None])
    with suppress(BadModelFile):
        assert gguf.read(path).vocabulary_size > 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from([b"", b"GGUF\3\0\0\0"]))
def test_any_bytes_are_a_bad_model_file(tmp_path: Path, data: bytes, magic: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(magic + data)
    with pytest.raises(BadModelFile):
        gguf.read(tmp_path / "x.gguf")


def refusal(variable: str, text: str) -> str:
    """Why the setting is not valid; nothing where it is."""
    try:
        Settings.from_env({variable: text})
    except SettingError as error:
        return str(error)
    return ""


@given(st.sampled_from([variable for variable, _, _ in table()]), st.text() | st.from_regex(r"[\w.:,/*\[\]-]+"))
def test_any_setting_is_taken_or_named(variable: str, text: str) -> None:
    assert refusal(variable, text) == "" or refusal(variable, text).startswith(f"{variable}={text!r}")


@given(st.text() | st.from_regex(r"[\w.:,/@%\[\]-]+"))
def test_any_host_is_ours_or_forbidden(header: str) -> None:
    with suppress(Forbidden):
        Hosts(Settings(), machine="box").check(header)
