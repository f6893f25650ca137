"""`GET /openapi.json`: the API as a machine reads it, made of the types that requests are decoded into."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import msgspec
from flask import Flask, Response
from msgspec import Meta, Struct
from werkzeug.routing import Rule

from rustllama import __version__
from rustllama.api import creation, ollama, openai, pull
from rustllama.api.options import Options
from rustllama.api.requests import MOST_ITEMS, Message
from rustllama.api.streaming import json_response

_VERSION = "3.1.0"
_REF = "#/components/schemas/{name}"
_JSON, _TEXT = "application/json", "text/plain"
_OWN = ("HEAD", "OPTIONS")  # Flask's


class Named(Struct, frozen=True):
    """The name of a model, as /api/list shows it."""

    model: str


class Kept(Struct, frozen=True):
    """How long the model stays loaded after the answer: seconds, or like "5m"; negative is for ever."""

    keep_alive: str | float | None = None


class Chosen(Struct, frozen=True):
    """Ollama's place for options."""

    options: Options | None = None


class Said(Struct, frozen=True):
    messages: Annotated[list[Message], Meta(max_length=MOST_ITEMS)]


class Error(Struct, frozen=True):
    """One sentence; below /v1 an object with `message`, `type`, `param` and `code`."""

    error: str | dict[str, object]


@dataclass(frozen=True, slots=True)
class Endpoint:
    summary: str
    body: tuple[type[Struct], ...] = ()  # its fields are those of all of them
    answers: tuple[str, ...] = (_JSON,)


_STREAMED = (_JSON, "application/x-ndjson")
_ENDPOINTS: Mapping[str, Endpoint] = {
    "GET /": Endpoint("Says that the server runs.", answers=(_TEXT,)),
    "GET /health": Endpoint("200, and 503 while the server drains."),
    "GET /metrics": Endpoint("What the server does and has done, for Prometheus.", answers=(_TEXT,)),
    "GET /openapi.json": Endpoint("This description."),
    "GET /api/version": Endpoint("The level of Ollama's API that is spoken, and rustllama's version."),
    "POST /api/create": Endpoint("Registers a GGUF file under a name.", (Named, creation.CreateBody), _STREAMED),
    "POST /api/blobs/{digest}": Endpoint("Takes a file, whose SHA-256 is the digest, for /api/create."),
    "POST /api/pull": Endpoint("Fetches a model and registers it.", (pull.PullBody,), _STREAMED),
    "GET /api/list": Endpoint("The registered models."),
    "GET /api/tags": Endpoint("The same as Ollama gives them."),
    "GET /api/ps": Endpoint("The models in memory."),
    "POST /api/show": Endpoint("What a model's file says of itself.", (Named,)),
    "DELETE /api/delete": Endpoint("Deletes a name; of files only the server's own, when no name is left.", (Named,)),
    "POST /api/chat": Endpoint("Answers a conversation.", (Named, Said, ollama.ChatBody, Chosen, Kept), _STREAMED),
    "POST /api/generate": Endpoint("Answers a prompt.", (Named, ollama.GenerateBody, Chosen, Kept), _STREAMED),
    "GET /v1/models": Endpoint("The registered models, as OpenAI gives them."),
    "GET /v1/models/{name}": Endpoint("One of them."),
    "POST /v1/chat/completions": Endpoint(
        "Answers a conversation in OpenAI's dialect.",
        (Named, Said, openai.CompletionBody, Options, Kept),
        (_JSON, "text/event-stream"),
    ),
}


class OpenAPI:
    """Of one application: every path that it has is described."""

    def __init__(self, app: Flask) -> None:
        self._app = app

    def register(self, app: Flask) -> None:
        app.add_url_rule("/openapi.json", view_func=self.openapi, methods=["GET"])

    def openapi(self) -> Response:
        return json_response(self._document)

    @cached_property
    def _document(self) -> dict[str, object]:
        paths: dict[str, dict[str, object]] = {}
        for rule in self._app.url_map.iter_rules():
            path = _path(rule)
            for method in sorted((rule.methods or set()).difference(_OWN)):
                described = _operation(_ENDPOINTS[f"{method} {path}"], rule)
                paths.setdefault(path, {})[method.lower()] = described
        info = {"title": "rustllama", "version": __version__}
        return {"openapi": _VERSION, "info": info, "paths": paths, "components": {"schemas": _schemas()}}


def _path(rule: Rule) -> str:
    """As OpenAPI writes it: a part that varies stands in braces."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)


def _operation(endpoint: Endpoint, rule: Rule) -> dict[str, object]:
    operation: dict[str, object] = {"summary": endpoint.summary, "responses": _responses(endpoint)}
    if rule.arguments:
        schema = {"type": "string"}
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": schema} for name in sorted(rule.arguments)
        ]
    if endpoint.body:
        fields = {"allOf": [{"$ref": _REF.format(name=part.__name__)} for part in endpoint.body]}
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": fields}}}
    return operation


def _responses(endpoint: Endpoint) -> dict[str, object]:
    failed = {_JSON: {"schema": {"$ref": _REF.format(name=Error.__name__)}}}
    return {
        "200": {"description": "Done.", "content": {kind: {} for kind in endpoint.answers}},
        "default": {"description": "What went wrong, in one sentence.", "content": failed},
    }


def _schemas() -> dict[str, Any]:
    parts = dict.fromkeys([Error, *(part for endpoint in _ENDPOINTS.values() for part in endpoint.body)])
    return msgspec.json.schema_components(parts, schema_hook=_anything, ref_template=_REF)[1]


def _anything(_: type) -> dict[str, object]:
    """Of `object`."""
    return {"description": "any JSON value"}
