"""Endpoints about the server itself: that it runs, its version, its health."""

from __future__ import annotations

from flask import Flask, Response

from rustllama import __version__
from rustllama.api.streaming import json_response
from rustllama.engine.manager import EngineManager
from rustllama.errors import Draining

# The level of Ollama's API that is spoken; some editors demand at least this.
_OLLAMA_LEVEL = "0.6.4"


class Home:
    def __init__(self, manager: EngineManager) -> None:
        self._manager = manager

    def register(self, app: Flask) -> None:
        app.add_url_rule("/", view_func=self.greeting, methods=["GET"])
        app.add_url_rule("/api/version", view_func=self.version, methods=["GET"])
        app.add_url_rule("/health", view_func=self.health, methods=["GET"])

    def greeting(self) -> Response:
        return Response("rustllama is running", content_type="text/plain; charset=utf-8")

    def version(self) -> Response:
        return json_response({"version": _OLLAMA_LEVEL, "rustllama": __version__})

    def health(self) -> Response:
        if self._manager.draining:
            raise Draining("The server is stopping: try again when it is back.")
        return json_response({"status": "ok"})
