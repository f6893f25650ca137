"""How answers end: errors before and after the first byte, clients that leave, and that everything is given back."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from werkzeug.test import create_environ, run_wsgi_app

from rustllama.bridge import Event, spawn
from rustllama.errors import Busy, InternalError, OutOfMemory
from tests.fakes import House, build_house, lines, ok, refused, turns


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path, keep_alive=0.0)


def is_free(house: House) -> bool:
    """Whether the last answer gave back the model (which leaves when idle, as keep_alive is 0 here)."""
    return house.engines.last.closed and house.manager.loaded() == []


def test_an_error_before_the_first_piece_has_a_status_even_in_a_stream(house: House) -> None:
    house.script.breaks_at, house.script.error = 0, InternalError("The engine failed.")
    assert refused(house.chat("Hi", stream=True), 500).startswith("The engine failed.")
    assert is_free(house)


def test_an_error_after_the_first_piece_is_the_last_line(house: House) -> None:
    house.script.breaks_at, house.script.error = 2, InternalError("The engine failed.")
    response = house.chat("Hi", stream=True)
    *pieces, last = lines(response)
    assert response.status_code == 200
    assert [piece["message"]["content"] for piece in pieces] == ["Hello", " there"]
    assert last.keys() == {"error"}
    assert response.headers["X-Request-Id"] in last["error"]
    assert is_free(house)


def test_an_error_in_an_answer_that_is_not_streamed_has_a_status(house: House) -> None:
    house.script.breaks_at, house.script.error = 2, InternalError("The engine failed.")
    refused(house.chat("Hi"), 500)
    assert is_free(house)


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_a_503_that_tells_when_to_try_again(house: House, stream: bool) -> None:
    house.script.refusal = Busy("server busy, please try again. maximum pending requests exceeded")
    response = house.chat("Hi", stream=stream)
    assert refused(response, 503) == "server busy, please try again. maximum pending requests exceeded"
    assert response.headers["Retry-After"] == "2"
    assert house.engines.last.prompts == []  # it is told before the prompt costs anything
    assert is_free(house)


def test_a_model_that_does_not_fit_is_a_503(house: House) -> None:
    house.script.load_error = OutOfMemory("the model needs 5 GiB, and 4 GiB are free.")
    response = house.chat("Hi")
    refused(response, 503)
    assert response.headers["Retry-After"] == "30"


def test_a_template_that_refuses_is_a_400_that_gives_the_model_back(house: House) -> None:
    template = "{{ raise_exception('no') }}{% for x in 3 %}{% endfor %}"
    refused(house.post("/api/generate", model="toy", prompt="Hi", template=template), 400)
    assert is_free(house)


def test_a_finished_stream_gives_the_model_back_once(house: House) -> None:
    response = house.chat("Hi", stream=True)
    assert lines(response)[-1]["done"]
    assert is_free(house)
    response.close()
    ok(house.chat("Hi"))


def test_a_client_that_leaves_in_the_middle_cancels_the_work(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rustllama.access")
    response = house.chat("Hi", stream=True)
    next(response.iter_encoded())
    response.close()
    assert house.engines.stream.cancelled
    assert is_free(house)
    assert " 499 " in caplog.messages[-1]


def test_a_client_that_leaves_before_the_first_byte_cancels_the_work(house: House) -> None:
    environ = create_environ("/api/chat", method="POST", json={"model": "toy", "messages": turns("Hi"), "stream": True})
    body = house.app.wsgi_app(environ, lambda *_: lambda _: None)
    body.close()  # type: ignore[attr-defined]
    assert house.engines.stream.cancelled
    assert is_free(house)


def test_a_client_that_leaves_while_nothing_comes_cancels_the_work(house: House) -> None:
    house.script.waits_at = 1
    response = house.chat("Hi", stream=True)
    spawn(lambda: house.engines.stream.cancel())
    assert response.data.count(b"\n") == 1  # what came before; no line tells of an error
    response.close()
    assert is_free(house)


def test_an_answer_whose_client_left_is_logged_as_499(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rustllama.access")
    house.script.waits_at = 1
    answered = Event()
    statuses = []

    def ask() -> None:
        response = house.chat("Hi")
        statuses.append(response.status_code)
        response.close()
        answered.set()

    spawn(ask)
    while not house.engines.made or not house.engines.last.streams:
        Event().wait(0.001)
    house.engines.stream.cancel()
    answered.wait()
    assert statuses == [499]
    assert " 499 " in caplog.messages[-1]
    assert is_free(house)


def test_answers_of_several_clients_come_side_by_side(house: House) -> None:
    responses = [house.chat("Hi", stream=True) for _ in range(3)]
    iterators = [response.iter_encoded() for response in responses]
    firsts = [next(iterator) for iterator in iterators]
    assert all(b"Hello" in first for first in firsts)
    assert all(b'"done":true' in b"".join(iterator) for iterator in iterators)
    assert is_free(house)


def test_each_piece_is_one_write(house: House) -> None:
    environ = create_environ("/api/chat", method="POST", json={"model": "toy", "messages": turns("Hi"), "stream": True})
    chunks = list(run_wsgi_app(house.app, environ)[0])
    assert [chunk.count(b"\n") for chunk in chunks] == [1, 1, 1, 1]


def test_the_first_event_of_openai_goes_out_with_the_first_piece(house: House) -> None:
    body = {"model": "toy", "messages": turns("Hi"), "stream": True}
    environ = create_environ("/v1/chat/completions", method="POST", json=body)
    chunks = list(run_wsgi_app(house.app, environ)[0])
    assert [chunk.count(b"data: ") for chunk in chunks] == [2, 1, 1, 2]


def test_a_stream_that_ends_by_the_drain_says_so(house: House) -> None:
    house.script.waits_at = 1
    response = house.chat("Hi", stream=True)
    iterator = response.iter_encoded()
    next(iterator)
    house.script.breaks_at = 1
    house.manager.drain(0.0)
    house.script.go.set()
    assert b"shutting down" in b"".join(iterator)
    response.close()
    assert is_free(house)
