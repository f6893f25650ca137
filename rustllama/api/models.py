"""Endpoints about models: create, list, show, delete, and what is loaded."""

from __future__ import annotations

from flask import Flask, Response
from msgspec import Struct

from rustllama.api import details
from rustllama.api.catalog import Catalog
from rustllama.api.decoding import refuse_unbuilt, typed
from rustllama.api.guard import body
from rustllama.api.keys import may_use
from rustllama.api.requests import model_name
from rustllama.api.streaming import json_response
from rustllama.engine.manager import EngineManager
from rustllama.errors import BadRequest

_OLLAMAS_CREATE = (
    "from",
    "files",
    "adapters",
    "template",
    "system",
    "license",
    "parameters",
    "messages",
    "modelfile",
    "quantize",
)


class CreateBody(Struct, frozen=True):
    modelpath: str


class Models:
    """See sections 1 and 2 of the HTTP contract."""

    def __init__(self, catalog: Catalog, manager: EngineManager) -> None:
        self._catalog = catalog
        self._manager = manager

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
        name = model_name(raw)
        refuse_unbuilt(raw, dict.fromkeys(_OLLAMAS_CREATE, ()))
        path = typed(CreateBody, raw).modelpath
        if not path:
            raise BadRequest("'modelpath' is empty: name a GGUF file.", "modelpath")
        self._catalog.create(name, path)
        return json_response({"status": "success"})

    def list(self) -> Response:
        found = self._catalog.list()
        listing = {"models": [details.listed(record) for record in found.models]}
        return json_response({**listing, "warnings": found.warnings} if found.warnings else listing)

    def tags(self) -> Response:
        return json_response({"models": [details.with_tag(record) for record in self._catalog.list().models]})

    def delete(self) -> Response:
        self._catalog.delete(model_name(body()))
        return json_response({"status": "success"})

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
