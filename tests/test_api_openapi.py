"""What /openapi.json promises is what the application has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.fakes import House, build_house, ok


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


@pytest.fixture
def document(house: House) -> dict[str, Any]:
    found: dict[str, Any] = ok(house.send("/openapi.json", b"", "GET"))
    return found


def test_the_description_is_valid(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


def test_every_path_is_described(house: House, document: dict[str, Any]) -> None:
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    rules = [rule for rule in house.app.url_map.iter_rules() if "<" not in rule.rule]
    there = {(rule.rule, method) for rule in rules for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    assert described == there | {("/v1/models/{name}", "GET"), ("/api/blobs/{digest}", "POST")}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/chat", {"model", "messages", "stream", "options", "keep_alive", "truncate", "shift", "progress"}),
        ("/api/generate", {"model", "prompt", "system", "template", "raw", "options", "keep_alive"}),
        ("/v1/chat/completions", {"model", "messages", "stream", "max_tokens", "temperature", "stream_options"}),
        ("/api/create", {"model", "modelpath", "files", "from", "template", "system", "parameters", "license"}),
    ],
)
def test_a_body_has_the_fields_that_are_read(document: dict[str, Any], path: str, fields: set[str]) -> None:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schemas = document["components"]["schemas"]
    parts = [schemas[part["$ref"].rpartition("/")[2]] for part in schema["allOf"]]
    assert fields <= {name for part in parts for name in part["properties"]}


def test_ranges_are_told(document: dict[str, Any]) -> None:
    num_ctx = document["components"]["schemas"]["Options"]["properties"]["num_ctx"]["anyOf"][0]
    assert (num_ctx["minimum"], num_ctx["maximum"]) == (16, 1 << 22)
