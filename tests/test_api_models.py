"""Names of models over HTTP: created, listed, shown, replaced, deleted; and files that change behind a name."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from rustllama.api.details import parameter_size, tagged
from rustllama.bridge import Event, spawn
from rustllama.verdicts import Verdicts
from tests.fakes import House, build_house, fake_record, lines, ok, refused
from tests.test_api_templates import children
from tests.toys import CHATML, write_toy


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("models") / "real.gguf", chat_template=CHATML)


def names(house: House) -> list[str]:
    return [model["name"] for model in ok(house.get("/api/list"))["models"]]


def create_failure(house: House, **body: object) -> str:
    response = house.post("/api/create", **body)
    assert response.status_code == 400, response.text
    answer = response.get_json()
    assert answer.keys() == {"status", "error"}
    assert answer["status"] == "failed to create model"
    return str(answer["error"])


def test_a_model_is_created_and_listed(house: House, gguf_file: Path) -> None:
    response = house.post("/api/create", name="Llama3.2", modelpath=str(gguf_file))
    assert response.data == b'{"status":"success"}\n'
    (model,) = [model for model in ok(house.get("/api/list"))["models"] if model["name"] == "Llama3.2"]
    assert (model["format"], model["path"]) == ("gguf", str(gguf_file))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+[+-]\d\d:\d\d", model["modified_at"])
    assert model["size"] == gguf_file.stat().st_size


def test_curls_own_form_type_creates_too(house: House, gguf_file: Path) -> None:
    body = b'{"name":"m", "modelpath":"%b"}' % os.fsencode(gguf_file)
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert ok(house.send("/api/create", body, **headers)) == {"status": "success"}


def test_a_home_folder_and_a_relative_path_are_resolved(
    house: House, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(gguf_file.parent))
    for path in ("~/real.gguf", os.path.relpath(gguf_file), f"{gguf_file.parent}/x/../real.gguf"):
        ok(house.post("/api/create", name="m", modelpath=path))
        assert house.registry.get("m").path == str(gguf_file)


def test_creates_at_the_same_time_all_succeed(house: House, gguf_file: Path) -> None:
    statuses: list[int] = []

    def create(name: str) -> None:
        statuses.append(house.post("/api/create", name=name, modelpath=str(gguf_file)).status_code)

    for name in ("a", "b", "a"):
        spawn(partial(create, name))
    while len(statuses) < 3:
        Event().wait(0.01)
    assert statuses == [200, 200, 200]
    assert set(names(house)) == {"a", "b", "toy"}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no file at"), (b"", "is empty"), (b"<!doctype html>", "HTML"), (b"GGUF\x03\0\0\0", "")],
)
def test_a_file_that_is_no_model_is_refused_with_its_absolute_path(
    house: House, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    sentence = create_failure(house, name="m", modelpath=str(path))
    assert str(path) in sentence
    assert words in sentence
    assert names(house) == ["toy"]


def test_a_file_is_proved_once_for_each_state_of_it(house: House, tmp_path: Path, gguf_file: Path) -> None:
    shutil.copy(gguf_file, path := tmp_path / "own.gguf")
    ok(house.post("/api/create", name="a", modelpath=str(path)))
    impatient = build_house(tmp_path, probe_timeout=1e-6)
    ok(impatient.post("/api/create", name="b", modelpath=str(path)))
    os.utime(path)
    assert "in time" in create_failure(impatient, name="b", modelpath=str(path))


def test_proofs_take_turns(house: House, tmp_path: Path, gguf_file: Path) -> None:
    """Each takes the memory of its model."""
    statuses: list[int] = []

    def create(name: str) -> None:
        path = shutil.copy(gguf_file, tmp_path / f"{name}.gguf")
        statuses.append(house.post("/api/create", name=name, modelpath=str(path)).status_code)

    for name in ("a", "b"):
        spawn(partial(create, name))
    before, most = children(), 0
    while len(statuses) < 2:
        most = max(most, len(children() - before))
        Event().wait(0.01)
    assert (statuses, most) == ([200, 200], 1)


def test_a_folder_is_refused(house: House, tmp_path: Path) -> None:
    assert "is a folder" in create_failure(house, name="m", modelpath=str(tmp_path))


def test_what_is_wrong_at_first_sight_has_its_status_in_a_streamed_create_too(house: House, tmp_path: Path) -> None:
    assert "There is no file" in create_failure(house, name="m", modelpath=str(tmp_path / "none.gguf"), stream=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"modelpath": "x"}, "'model' is missing"),
        ({"name": "m"}, "'modelpath' is missing"),
        ({"name": "m", "modelpath": ""}, "'modelpath' is empty"),
        ({"name": "m", "modelpath": 7}, "'modelpath' must be a string"),
        ({"name": "a b", "modelpath": "x"}, "not a name"),
        ({"name": "m", "modelpath": "a\0b"}, "null"),
        ({"name": "m", "modelpath": "x" * 5000}, "cannot be opened"),
        ({"name": "m", "modelfile": "FROM x"}, "'modelfile' is not supported"),
    ],
)
def test_a_wrong_create_says_why(house: House, body: dict[str, object], words: str) -> None:
    assert words in create_failure(house, **body)


def test_a_create_with_malformed_json_fails_in_its_own_shape(house: House) -> None:
    response = house.send("/api/create", b"{")
    assert response.status_code == 400
    assert response.get_json()["status"] == "failed to create model"


def test_a_name_is_deleted_and_its_file_stays(house: House, tmp_path: Path) -> None:
    response = house.send("/api/delete", b'{"name":"toy"}', "DELETE")
    assert response.data == b'{"status":"success"}\n'
    assert names(house) == []
    assert (tmp_path / "toy.gguf").exists()


@pytest.mark.parametrize("body", [b'{"model":"toy"}', b'{"name":"TOY:latest"}', b'{"name":" toy "}'])
def test_delete_takes_either_field_and_any_spelling(house: House, body: bytes) -> None:
    ok(house.send("/api/delete", body, "DELETE"))


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/show"])
def test_an_unknown_model_is_a_404_that_names_those_that_exist(house: House, path: str) -> None:
    sentence = refused(house.post(path, model="x", prompt="Hi"), 404)
    assert sentence.startswith("model 'x' not found")
    assert "toy" in sentence


def spoil_entry(house: House, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "rustllama.db")) as other, other:
        other.execute("UPDATE model SET info = '{}'")


def test_an_entry_that_cannot_be_read_is_told_and_deleted(house: House, tmp_path: Path) -> None:
    assert ok(house.get("/api/list")).keys() == {"models"}
    spoil_entry(house, tmp_path)
    listing = ok(house.get("/api/list"))
    assert (listing["models"], len(listing["warnings"])) == ([], 1)
    assert "'toy' cannot be read; create it again" in refused(house.chat("Hi"), 500)
    ok(house.send("/api/delete", b'{"name":"toy"}', "DELETE"))
    assert ok(house.get("/api/list")) == {"models": []}


def test_an_entry_that_cannot_be_read_is_created_again(house: House, tmp_path: Path, gguf_file: Path) -> None:
    spoil_entry(house, tmp_path)
    ok(house.post("/api/create", name="toy", modelpath=str(gguf_file)))
    assert names(house) == ["toy"]


def test_deleting_an_unknown_model_is_a_404(house: House) -> None:
    assert refused(house.send("/api/delete", b'{"name":"x"}', "DELETE"), 404).startswith("model 'x' not found")


def test_tags_has_full_names_and_details(house: House) -> None:
    (model,) = ok(house.get("/api/tags"))["models"]
    assert (model["name"], model["model"]) == ("toy:latest", "toy:latest")
    assert len(model["digest"]) == 64
    assert model["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "1.24B",
        "quantization_level": "Q8_0",
    }


def test_show_tells_what_the_file_holds(house: House, tmp_path: Path) -> None:
    shown = ok(house.post("/api/show", model="toy"))
    assert shown["model_info"]["llama.context_length"] == 4096
    assert shown["model_info"]["general.parameter_count"] == 1_235_814_432
    assert (shown["template"], shown["capabilities"]) == (CHATML, ["completion"])
    assert (shown["modelfile"], shown["path"]) == (f"FROM {tmp_path / 'toy.gguf'}\n", str(tmp_path / "toy.gguf"))
    assert shown.keys() >= {"parameters", "system", "license", "details", "modified_at"}


def test_ps_tells_of_slots_and_queue(house: House) -> None:
    house.chat("Hi", keep_alive=-1)
    (loaded,) = ok(house.get("/api/ps"))["models"]
    state = house.engines.last.state()
    assert (loaded["name"], loaded["model"]) == ("toy:latest", "toy:latest")
    assert (loaded["slots"], loaded["queued"], loaded["context_length"]) == (state.slots, 0, state.context_length)
    assert (loaded["size"], loaded["size_vram"]) == (state.size_bytes, 0)
    assert "expires_at" not in loaded  # it stays


def test_openais_list_and_card_of_a_model(house: House) -> None:
    card = {"id": "toy", "object": "model", "created": 1728079009, "owned_by": "rustllama"}
    assert ok(house.get("/v1/models")) == {"object": "list", "data": [card]}
    assert ok(house.get("/v1/models/toy:latest")) == card


def test_openais_card_of_a_name_with_a_slash(house: House, tmp_path: Path) -> None:
    house.registry.put(fake_record(tmp_path / "other.gguf", "a/b:c"))
    assert ok(house.get("/v1/models/a/b:c"))["id"] == "a/b:c"


def test_openais_card_of_an_unknown_model_is_a_404(house: House) -> None:
    response = house.get("/v1/models/x")
    assert (response.status_code, response.get_json()["error"]["code"]) == (404, "model_not_found")


def test_replacing_a_loaded_model_lets_its_stream_end_and_then_frees_it(house: House, gguf_file: Path) -> None:
    response = house.chat("Hi", stream=True)
    old = house.engines.last
    ok(house.post("/api/create", name="toy", modelpath=str(gguf_file)))
    still_there = not old.closed
    assert lines(response)[-1]["done_reason"] == "stop"
    assert (still_there, old.closed) == (True, True)
    house.chat("Hi")
    assert house.engines.last.record.path == str(gguf_file)


def test_deleting_a_loaded_model_lets_its_stream_end_and_then_frees_it(house: House) -> None:
    response = house.chat("Hi", stream=True)
    ok(house.send("/api/delete", b'{"name":"toy"}', "DELETE"))
    still_there = not house.engines.last.closed
    assert lines(response)[-1]["done_reason"] == "stop"
    assert (still_there, house.engines.last.closed) == (True, True)
    refused(house.chat("Hi"), 404)


def test_deleting_an_idle_loaded_model_frees_it_at_once(house: House) -> None:
    house.chat("Hi")
    ok(house.send("/api/delete", b'{"name":"toy"}', "DELETE"))
    assert house.engines.last.closed


@pytest.mark.parametrize("deleted", ["used", "other"])
def test_a_file_with_two_names_stays_loaded_for_the_one_in_use(house: House, gguf_file: Path, deleted: str) -> None:
    for name in ("used", "other"):
        ok(house.post("/api/create", name=name, modelpath=str(gguf_file)))
    ok(house.post("/api/generate", model="used", prompt="Hi"))
    ok(house.send("/api/delete", b'{"name":"%b"}' % deleted.encode(), "DELETE"))
    assert house.engines.last.closed == (deleted == "used")
    assert house.engines.forgotten == []


def test_a_file_that_is_gone_is_named(house: House, tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").unlink()
    assert str(tmp_path / "toy.gguf") in refused(house.chat("Hi"), 400)


def test_a_file_that_was_spoilt_is_refused_even_while_it_is_loaded(house: House, tmp_path: Path) -> None:
    house.chat("Hi")
    (tmp_path / "toy.gguf").write_bytes(b"no model any more")
    assert "is not a GGUF file" in refused(house.chat("Hi"), 400)
    assert house.engines.last.closed  # llama.cpp dies of a page that a mapped file has no more


def test_a_model_whose_file_is_gone_frees_its_memory_when_it_is_asked_for(house: House, tmp_path: Path) -> None:
    house.chat("Hi", keep_alive=-1)
    (tmp_path / "toy.gguf").unlink()
    refused(house.chat("Hi"), 400)
    assert house.engines.last.closed


def test_a_name_deleted_while_its_file_is_examined_again_stays_deleted(
    house: House, tmp_path: Path, gguf_file: Path
) -> None:
    shutil.copy(gguf_file, tmp_path / "toy.gguf")
    asking: list[int] = []
    spawn(lambda: asking.append(house.chat("Hi").status_code))
    Event().wait(0.01)  # it is being proved, which takes a process
    ok(house.send("/api/delete", b'{"name":"toy"}', "DELETE"))
    while not asking:
        Event().wait(0.01)
    assert (asking, names(house)) == ([404], [])


def test_a_file_that_was_replaced_is_examined_and_loaded_again(house: House, tmp_path: Path, gguf_file: Path) -> None:
    house.chat("Hi")
    old = house.engines.last
    shutil.copy(gguf_file, tmp_path / "toy.gguf")
    ok(house.chat("Hi"))
    assert old.closed
    assert house.engines.last.record.info.vocabulary_size == 512
    assert house.registry.get("toy").digest == house.engines.last.record.digest


def test_a_model_in_quarantine_is_refused_until_it_is_created_again(house: House, gguf_file: Path) -> None:
    ok(house.post("/api/create", name="m", modelpath=str(gguf_file)))
    record = house.registry.get("m")
    for _ in range(2):
        Verdicts(house.registry).blame(record.digest, record.identity, "SIGABRT")
    assert "is in quarantine until" in refused(house.chat("Hi", model="m"), 503)
    answer = house.complete("Hi", model="m")
    assert (answer.get_json()["error"]["code"], answer.headers["Retry-After"]) == ("quarantined", "600")
    ok(house.chat("Hi"))
    ok(house.post("/api/create", name="other", modelpath=str(gguf_file)))
    ok(house.chat("Hi", model="m"))


@pytest.mark.parametrize(
    ("count", "words"),
    [(999, "999"), (1_000_000, "1M"), (134_515_008, "135M"), (8_030_261_248, "8.03B"), (1_040_000_000_000, "1040B")],
)
def test_counts_of_parameters_are_short(count: int, words: str) -> None:
    assert parameter_size(count) == words


@pytest.mark.parametrize(("name", "full"), [("x", "x:latest"), ("x:1b", "x:1b"), ("a/x", "a/x:latest")])
def test_a_full_name_has_a_tag(name: str, full: str) -> None:
    assert tagged(name) == full


def test_what_a_model_computed_is_forgotten_with_its_last_name(house: House, gguf_file: Path) -> None:
    for name in ("a", "b"):
        ok(house.post("/api/create", name=name, modelpath=str(gguf_file)))
    digest = house.registry.get("a").digest
    ok(house.send("/api/delete", b'{"name":"a"}', "DELETE"))
    assert house.engines.forgotten == []
    ok(house.send("/api/delete", b'{"name":"b"}', "DELETE"))
    assert house.engines.forgotten == [digest]
