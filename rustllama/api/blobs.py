"""Files of models that clients send, by their digest: `HEAD` and `POST /api/blobs/:digest`."""

from __future__ import annotations

from contextlib import ExitStack

from flask import Flask, Response, request

from rustllama.api.guard import expect_large_body, pieces
from rustllama.api.streaming import json_response
from rustllama.bridge import offload
from rustllama.errors import NotFound
from rustllama.model_files import ModelFiles

CREATED = 201


class Blobs:
    """`POST /api/create` makes models of them; see section 2 of the HTTP contract."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def register(self, app: Flask) -> None:
        app.add_url_rule("/api/blobs/<digest>", view_func=self.find, methods=["HEAD"])
        app.add_url_rule("/api/blobs/<digest>", view_func=self.receive, methods=["POST"])

    def find(self, digest: str) -> Response:
        if not self._is_there(digest):
            raise NotFound(f"There is no file with the digest {digest}: send it.")
        return Response(content_type="application/json")

    def receive(self, digest: str) -> Response:
        if self._is_there(digest):
            expect_large_body()  # it is read all the same, as clients look for an answer only when they have sent it
            return json_response({"status": "success"})
        with ExitStack() as ending:
            incoming = offload(self._files.receive, digest, request.content_length)
            ending.callback(offload, incoming.close)
            for piece in pieces():
                offload(incoming.write, piece)
            offload(incoming.keep)
        response = json_response({"status": "success"})
        response.status_code = CREATED
        return response

    def _is_there(self, digest: str) -> bool:
        return offload(self._files.path_of(digest).is_file)
