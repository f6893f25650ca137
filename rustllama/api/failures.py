"""Errors on the wire: every exception becomes JSON, in the shape of the dialect that was spoken."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
from flask import Flask, Response, request
from werkzeug import exceptions as http

from rustllama.api.access import Call, call_of
from rustllama.errors import (
    BadRequest,
    InternalError,
    MethodNotAllowed,
    NotFound,
    RustllamaError,
    TooLarge,
    Unauthorized,
)

_LOG = logging.getLogger("rustllama")

Shape = Callable[[RustllamaError, str], dict[str, object]]


def ollama_shape(_: RustllamaError, text: str) -> dict[str, object]:
    return {"error": text}


def create_shape(_: RustllamaError, text: str) -> dict[str, object]:
    return {"status": "failed to create model", "error": text}


def openai_shape(error: RustllamaError, text: str) -> dict[str, object]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    field = error.field if isinstance(error, BadRequest) else None
    return {"error": {"message": text, "type": kind, "param": field, "code": error.code}}


def plain_failure(error: RustllamaError, path: str) -> bytes:
    """The JSON of an error that is met before there is a Call, ending in a newline."""
    return msgspec.json.encode(_shape_for(path)(error, str(error))) + b"\n"


def encode_failure(error: RustllamaError, call: Call, shape: Shape) -> bytes:
    """The JSON of an error, without a newline. What is our own fault is logged under the request's id."""
    text = str(error)
    if isinstance(error, InternalError):
        _LOG.error("request %s: %s", call.id, text, exc_info=error)
        text += f" The log says more under the id {call.id}."
    return msgspec.json.encode(shape(error, text))


def install(app: Flask) -> None:
    """Puts JSON in the place of every error page of `app`."""
    app.register_error_handler(RustllamaError, _answer)
    app.register_error_handler(http.HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_unexpected)


def _answer(error: RustllamaError) -> Response:
    call = call_of(request.environ)
    call.failed(error)
    response = Response(
        encode_failure(error, call, _shape_for(request.path)) + b"\n",
        status=error.status,
        content_type="application/json",
    )
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _answer_http(error: http.HTTPException) -> Response:
    response = _answer(_translated(error))
    if isinstance(error, http.MethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
    return response


def _answer_unexpected(error: Exception) -> Response:
    ours = InternalError("Something went wrong in the server.")
    ours.__cause__ = error
    return _answer(ours)


def _translated(error: http.HTTPException) -> RustllamaError:
    if isinstance(error, http.NotFound):
        return NotFound(f"There is nothing at {request.path[:100]}: see the README for the endpoints.")
    if isinstance(error, http.MethodNotAllowed):
        allowed = " or ".join(sorted({*(error.valid_methods or ())} - {"HEAD", "OPTIONS"}))
        return MethodNotAllowed(f"{request.path} does not take {request.method[:20]}: use {allowed}.")
    if isinstance(error, http.RequestEntityTooLarge):
        most = request.max_content_length
        return TooLarge(f"The body is larger than {most} bytes: send less, or raise RUSTLLAMA_MAX_BODY at the server.")
    return BadRequest("The request could not be read: send it again, whole.")


def _shape_for(path: str) -> Shape:
    if path.startswith("/v1/"):
        return openai_shape
    return create_shape if path == "/api/create" else ollama_shape
