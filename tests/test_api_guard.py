"""What holds for every path and method: JSON errors, ids, the log line, limits, the drain."""

from __future__ import annotations

import json
import logging
from io import BytesIO
from pathlib import Path

import pytest
from flask import Response
from gunicorn.http.errors import InvalidChunkSize
from werkzeug.test import TestResponse

from rustllama.errors import InternalError
from tests.fakes import House, build_house, ok, refused

POSTS = ["/api/chat", "/api/generate", "/api/create", "/api/show", "/v1/chat/completions"]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path, max_body=4096)


def send_chunked(house: House, body: object) -> TestResponse:
    """A body without a length, as Gunicorn hands it on."""
    environ = {"wsgi.input_terminated": True, "wsgi.input": body}
    return house.app.test_client().post("/api/chat", environ_overrides=environ)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "PATCH", "BREW"])
@pytest.mark.parametrize("path", ["/nothing", "/api/", "/api/chat/", "/api//list", "/static/x", "/%2e%2e/x", "/ü"])
def test_an_unknown_path_is_a_json_404(house: House, path: str, method: str) -> None:
    response = house.send(path, b"", method)
    assert response.content_type == "application/json"
    assert "There is nothing at" in refused(response, 404)


@pytest.mark.parametrize(
    ("method", "path", "right", "allow"),
    [
        ("GET", "/api/chat", "POST", "OPTIONS, POST"),
        ("PUT", "/api/chat", "POST", "OPTIONS, POST"),
        ("POST", "/api/list", "GET", "GET, HEAD, OPTIONS"),
        ("GET", "/api/delete", "DELETE", "DELETE, OPTIONS"),
        ("POST", "/api/delete", "DELETE", "DELETE, OPTIONS"),
        ("BREW", "/", "GET", "GET, HEAD, OPTIONS"),
        ("DELETE", "/api/ps", "GET", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_wrong_method_is_a_json_405_that_tells_the_right_one(
    house: House, method: str, path: str, right: str, allow: str
) -> None:
    response = house.send(path, b"", method)
    assert refused(response, 405) == f"{path} does not take {method}: use {right}."
    assert response.headers["Allow"] == allow


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)]
)
def test_errors_below_v1_have_openais_shape(house: House, method: str, path: str, status: int) -> None:
    response = house.send(path, b"", method)
    assert response.status_code == status
    error = response.get_json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_too_large_is_a_413(house: House, path: str) -> None:
    response = house.send(path, b'{"model": "' + b"x" * 5000 + b'"}')
    assert response.status_code == 413
    assert "4096 bytes" in response.text
    assert "RUSTLLAMA_MAX_BODY" in response.text


@pytest.mark.parametrize(("size", "status"), [(4095, 400), (4096, 413), (5000, 413)])
def test_a_chunked_body_has_the_same_limit(house: House, size: int, status: int) -> None:
    refused(send_chunked(house, BytesIO(b" " * size)), status)


def test_a_badly_chunked_body_is_a_400(house: House) -> None:
    class Broken:
        def read(self, _: int) -> bytes:
            raise InvalidChunkSize(b"ZZ")

    assert "ZZ" in refused(send_chunked(house, Broken()), 400)


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags", "/health"])
def test_head_has_the_headers_of_get_and_no_body(house: House, path: str) -> None:
    response = house.send(path, b"", "HEAD")
    assert (response.status_code, response.data) == (200, b"")
    assert response.content_type == house.get(path).content_type


def test_the_root_says_that_the_server_runs(house: House) -> None:
    assert house.get("/").text == "rustllama is running"


def test_the_version_is_digits_and_dots_and_new_enough_for_editors(house: House) -> None:
    version = ok(house.get("/api/version"))
    assert tuple(map(int, version["version"].split("."))) >= (0, 6, 4)
    assert version["rustllama"]


def test_a_request_gets_an_id_of_its_own(house: House) -> None:
    ids = {house.get("/health").headers["X-Request-Id"] for _ in range(3)}
    assert len(ids) == 3


def test_a_clients_id_is_kept(house: House) -> None:
    assert house.send("/nothing", b"", "GET", **{"X-Request-Id": "a-1.B:2"}).headers["X-Request-Id"] == "a-1.B:2"


@pytest.mark.parametrize("id", ["a b", "<script>", "x" * 65, "é", ""])
def test_an_id_that_is_unfit_for_a_log_is_replaced(house: House, id: str) -> None:
    given = house.send("/health", b"", "GET", **{"X-Request-Id": id}).headers["X-Request-Id"]
    assert given != id
    assert given.isalnum()


def test_our_own_fault_is_a_500_with_an_id_that_the_log_carries(house: House, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Response:
        raise ZeroDivisionError("secret")

    house.app.add_url_rule("/broken", view_func=broken)
    response = house.get("/broken")
    sentence = refused(response, 500)
    assert response.headers["X-Request-Id"] in sentence
    assert "secret" not in response.text
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert response.headers["X-Request-Id"] in record.getMessage()
    assert "ZeroDivisionError: secret" in caplog.text


def test_a_fault_of_the_engine_carries_its_id_too(house: House) -> None:
    house.script.load_error = InternalError("The model could not be loaded.")
    response = house.chat("Hi")
    assert refused(response, 500).startswith("The model could not be loaded. ")
    assert response.headers["X-Request-Id"] in response.text


@pytest.mark.parametrize("path", POSTS)
def test_a_server_that_stops_takes_no_more_work(house: House, path: str) -> None:
    house.manager.draining = True
    response = house.post(path, model="toy")
    assert response.status_code == (503 if path != "/api/show" else 200)
    assert path == "/api/show" or response.headers["Retry-After"] == "2"


def test_a_server_that_stops_still_answers_questions_but_is_not_healthy(house: House) -> None:
    ok(house.get("/health"))
    house.manager.draining = True
    ok(house.get("/api/list"))
    refused(house.get("/health"), 503)
    refused(house.send("/api/delete", b'{"name":"toy"}', "DELETE"), 503)


def test_each_request_writes_one_line_without_what_was_said(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rustllama.access")
    house.script.pieces = ("secret answer",)
    response = house.chat("secret question", stream=True)
    response.get_data()
    response.close()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "rustllama.access"]
    assert line.startswith(f"{response.headers['X-Request-Id']} POST /api/chat 200 ")
    for word in ("model=toy", "prompt_tokens=", "answer_tokens=1", "queue_ms=", "first_token_ms=", "tokens_per_s="):
        assert word in line
    assert "secret" not in line


@pytest.mark.parametrize(("method", "status"), [("GET", 404), ("HEAD", 404), ("POST", 404)])
def test_a_path_cannot_forge_a_line_of_the_log(
    house: House, caplog: pytest.LogCaptureFixture, method: str, status: int
) -> None:
    caplog.set_level(logging.INFO, "rustllama.access")
    house.send("/x%0A%1B[2Jforged", b"", method).close()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "rustllama.access"]
    assert line.isprintable()
    assert f" {status} " in line


def test_answers_are_compact_json_that_ends_in_a_newline(house: House) -> None:
    for path in ("/api/list", "/api/tags", "/api/ps", "/api/version", "/health", "/v1/models", "/nothing"):
        body = house.get(path).data
        assert body.endswith(b"}\n")
        assert json.loads(body)
