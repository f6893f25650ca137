"""Endpoints about models: create, list, show, delete, and what is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import msgspec
from flask import Flask, Response, request, stream_with_context

from rustllama.api import details
from rustllama.api.access import Call, call_of
from rustllama.api.catalog import Catalog
from rustllama.api.creation import CreateBody, read_creation
from rustllama.api.failures import encode_failure, ollama_shape
from rustllama.api.guard import body
from rustllama.api.keys import may_use
from rustllama.api.renderer import Renderer
from rustllama.api.requests import model_name
from rustllama.api.streaming import json_response
from rustllama.bridge import offload
from rustllama.core import Preset
from rustllama.engine.manager import EngineManager
from rustllama.errors import BadRequest, RustllamaError, TemplateRefused
from rustllama.model_files import ModelFiles

_SUCCESS = {"status": "success"}


class Models:
    """See sections 1 and 2 of the HTTP contract."""

    def __init__(self, catalog: Catalog, manager: EngineManager, renderer: Renderer, files: ModelFiles) -> None:
        self._catalog = catalog
        self._manager = manager
        self._renderer = renderer
        self._files = files

    def register(self, app: Flask) -> None:
        app.add_url_rule("/api/create", view_func=self.create, methods=["POST"])
        app.add_url_rule("/api/list", view_func=self.list, methods=["GET"])
        app.add_url_rule("/api/tags", view_func=self.tags, methods=["GET"])
        app.add_url_rule("/api/delete", view_func=self.delete, methods=["DELETE"])
        app.add_url_rule("/api/show", view_func=self.show, methods=["POST"])
        app.add_url_rule("/api/ps", view_func=self.ps, methods=["GET"])
        app.add_url_rule("/v1/models", view_func=self.openai_list, methods=["GET"])
        app.add_url_rule("/v1/models/<path:name>", view_func=self.openai_show, methods=["GET"])

    def create(self) -> Response:
        raw = body()
        name, asked = model_name(raw), read_creation(raw)
        path, preset = self._source(asked)
        if asked.template:
            self._check_template(asked.template)
        record = self._catalog.examine(name, path, preset)  # what is wrong at first sight is told by the status
        work = partial(self._catalog.create, record)
        if asked.stream:
            lines = stream_with_context(_told(asked, work, call_of(request.environ)))
            return Response(lines, content_type="application/x-ndjson")
        work()
        return json_response(_SUCCESS)

    def _source(self, asked: CreateBody) -> tuple[str, Preset]:
        """The path of the model's file, and what the name adds to it."""
        if asked.modelpath:
            return asked.modelpath, asked.preset
        if asked.from_:
            base = self._catalog.get(asked.from_)
            return base.path, _added(base.preset, asked.preset)
        path = self._files.path_of(asked.digest)
        if not offload(path.is_file):
            raise BadRequest(f"'files': there is no {asked.digest}; send it first, by POST /api/blobs/DIGEST.", "files")
        return str(path), asked.preset

    def _check_template(self, template: str) -> None:
        try:
            self._renderer.check(template)
        except TemplateRefused as error:
            raise BadRequest(
                f"'template' has to be Jinja, as in the model's file, which is used where there is none here. {error}",
                "template",
            ) from None

    def list(self) -> Response:
        found = self._catalog.list()
        listing = {"models": [details.listed(record) for record in found.models]}
        return json_response({**listing, "warnings": found.warnings} if found.warnings else listing)

    def tags(self) -> Response:
        return json_response({"models": [details.with_tag(record) for record in self._catalog.list().models]})

    def delete(self) -> Response:
        self._catalog.delete(model_name(body()))
        return json_response(_SUCCESS)

    def show(self) -> Response:
        return json_response(details.shown(self._catalog.get(model_name(body()))))

    def ps(self) -> Response:
        loaded_models = [loaded for loaded in self._manager.loaded() if may_use(loaded.record.name)]
        return json_response({"models": [details.running(loaded) for loaded in loaded_models]})

    def openai_list(self) -> Response:
        records = self._catalog.list().models
        return json_response({"object": "list", "data": [details.openai_model(record) for record in records]})

    def openai_show(self, name: str) -> Response:
        return json_response(details.openai_model(self._catalog.get(model_name({"model": name}))))


def _added(base: Preset, more: Preset) -> Preset:
    return Preset(
        more.template or base.template,
        more.system or base.system,
        {**base.parameters, **more.parameters},
        more.license or base.license,
        base.origin,
    )


def _told(asked: CreateBody, work: Callable[[], None], call: Call) -> Iterator[bytes]:
    """Lines as Ollama streams them."""
    if asked.files:
        yield _line({"status": f"using existing layer {asked.digest}"})
    yield _line({"status": "parsing GGUF"})
    try:
        work()
    except RustllamaError as error:
        call.failed(error)
        yield encode_failure(error, call, ollama_shape) + b"\n"
    else:
        yield _line(_SUCCESS)


def _line(fields: Mapping[str, str]) -> bytes:
    return msgspec.json.encode(fields) + b"\n"
