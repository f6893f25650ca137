"""`"progress": true`: what a stream tells before its first token, in both dialects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rustllama.bridge import Event
from rustllama.core import Progress, Queued, Reading
from rustllama.errors import BadModelFile, InternalError
from tests.fakes import House, build_house, events, lines, ok, refused

TOLD: tuple[Progress, ...] = (Queued(2), Queued(1), Reading(0, 30, 0), Reading(20, 30, 8), Reading(30, 30, 8))
WIRED = [
    {"status": "queued", "position": 2},
    {"status": "queued", "position": 1},
    {"status": "prompt", "completed": 0, "total": 30, "cached": 0},
    {"status": "prompt", "completed": 20, "total": 30, "cached": 8},
    {"status": "prompt", "completed": 30, "total": 30, "cached": 8},
]
FIELDS = ("status", "position", "completed", "total", "cached")


@pytest.fixture
def house(tmp_path: Path) -> House:
    made = build_house(tmp_path)
    made.script.progress = TOLD
    ok(made.post("/api/chat", model="toy"))
    return made


@pytest.fixture
def cold_house(tmp_path: Path) -> House:
    made = build_house(tmp_path, keep_alive=0.0)
    made.script.load_waits = Event()
    return made


def told(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: line[name] for name in FIELDS if name in line} for line in found if "status" in line]


def test_lines_of_progress_come_before_the_first_token(house: House) -> None:
    found = lines(house.chat("Hi", stream=True, progress=True))
    assert told(found[:5]) == WIRED
    assert [line["message"]["content"] for line in found[5:]] == ["Hello", " there", ".", ""]
    assert [line["done"] for line in found] == [False] * 8 + [True]


def test_a_line_of_progress_has_all_that_other_lines_have(house: House) -> None:
    first, *_, piece, _ = lines(house.chat("Hi", stream=True, progress=True))
    assert first.keys() > piece.keys()
    assert (first["message"], first["done"]) == ({"role": "assistant", "content": ""}, False)
    first, *_, piece, _ = lines(house.post("/api/generate", model="toy", prompt="Hi", stream=True, progress=True))
    assert first.keys() > piece.keys()
    assert first["response"] == ""


def test_each_line_of_progress_is_written_when_it_is_known(house: House) -> None:
    response = house.chat("Hi", stream=True, progress=True)
    assert [chunk.count(b"\n") for chunk in response.iter_encoded()] == [1] * 9


@pytest.mark.parametrize("fields", [{}, {"progress": False}, {"progress": None}])
def test_who_does_not_ask_gets_none(house: House, fields: dict[str, object]) -> None:
    assert len(lines(house.chat("Hi", stream=True, **fields))) == 4
    assert not told(events(house.complete("Hi", stream=True, **fields)))


def test_without_a_stream_progress_is_ignored_with_a_warning(house: House) -> None:
    reply = ok(house.chat("Hi", progress=True))
    assert reply["message"]["content"] == "Hello there."
    assert "needs 'stream': true" in reply["warnings"][0]
    assert "needs 'stream': true" in ok(house.complete("Hi", progress=True))["warnings"][0]


def test_openais_chunks_tell_it_in_a_field_of_their_own(house: House) -> None:
    opening, *found = events(house.complete("Hi", stream=True, progress=True))
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["progress"] for chunk in found[:5]] == WIRED
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in found[:5]] == [{}] * 5
    assert not any("progress" in chunk for chunk in found[5:])


def test_the_log_tells_when_the_first_token_came(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rustllama.access")
    response = house.chat("Hi", stream=True, progress=True)
    assert lines(response)[-1]["done"]
    response.close()
    assert "first_token_ms=0.0" not in caplog.messages[-1]


def test_a_load_is_told_in_bytes(cold_house: House) -> None:
    response = cold_house.chat("Hi", stream=True, progress=True)
    cold_house.script.load_waits.set()  # type: ignore[union-attr]
    found = lines(response)
    size = cold_house.registry.get("toy").info.size_bytes
    assert {(line["status"], line["total"]) for line in found if "status" in line} == {("loading", size)}
    assert told(found)[-1]["completed"] == size
    assert "".join(line["message"]["content"] for line in found) == "Hello there."
    assert found[-1]["load_duration"] > 0


def test_a_request_that_only_loads_tells_it_too(cold_house: House) -> None:
    response = cold_house.post("/api/generate", model="toy", stream=True, progress=True)
    cold_house.script.load_waits.set()  # type: ignore[union-attr]
    *found, last = lines(response)
    assert {line["status"] for line in found} == {"loading"}
    assert (last["done"], last["done_reason"], last["response"]) == (True, "load", "")


def test_an_error_after_progress_is_the_last_line(house: House) -> None:
    house.script.breaks_at, house.script.error = 0, InternalError("The engine failed.")
    *found, last = lines(house.chat("Hi", stream=True, progress=True))
    assert told(found) == WIRED
    assert last.keys() == {"error"}


def test_a_load_that_fails_after_progress_says_so_in_the_last_line(cold_house: House) -> None:
    cold_house.script.load_error = BadModelFile("broken")
    response = cold_house.chat("Hi", stream=True, progress=True)
    cold_house.script.load_waits.set()  # type: ignore[union-attr]
    assert lines(response)[-1] == {"error": "broken"}


def test_an_error_before_any_progress_has_its_status(house: House) -> None:
    assert "not found" in refused(house.chat("Hi", model="x", stream=True, progress=True), 404)
    assert "tokens" in refused(house.chat("long " * 5000, stream=True, progress=True), 400)


def test_a_client_that_leaves_during_a_load_is_forgotten(cold_house: House) -> None:
    response = cold_house.chat("Hi", stream=True, progress=True)
    next(response.iter_encoded())
    response.close()
    cold_house.script.load_waits.set()  # type: ignore[union-attr]
    while not cold_house.engines.made or not cold_house.engines.last.closed:
        Event().wait(0.001)
    assert cold_house.engines.last.requests == []


def test_a_client_that_leaves_while_it_waits_cancels_the_work(house: House) -> None:
    response = house.chat("Hi", stream=True, progress=True)
    assert b"queued" in next(response.iter_encoded())
    response.close()
    assert house.engines.stream.cancelled
