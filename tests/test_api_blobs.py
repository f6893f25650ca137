"""Files that clients send: whole or not at all, however slowly; models made of them; and what is deleted when."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from rustllama.keys import ApiKey, digest_of
from rustllama.model_files import ModelFiles
from tests.conftest import Server, start_server
from tests.disks import Disk
from tests.fakes import House, build_house, lines, ok, refused
from tests.nginx import Nginx, needs_nginx
from tests.test_limits import LIMIT_S, SHORT, answer, connect, readable
from tests.test_serve import until
from tests.toys import CHATML, write_toy

CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_toy(tmp_path_factory.mktemp("models") / "real.gguf", chat_template=CHATML).read_bytes()


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def blobs(home: Path) -> list[str]:
    return sorted(path.name.replace("-", ":") for path in (home / "models" / "blobs").glob("*"))


def send(house: House, data: bytes, status: int = 201) -> str:
    response = house.send(f"/api/blobs/{digest(data)}", data)
    assert (response.status_code, response.get_json()) == (status, {"status": "success"})
    return digest(data)


def create(house: House, name: str, **body: object) -> dict[str, object]:
    return ok(house.post("/api/create", model=name, **body))


def delete(house: House, name: str) -> None:
    ok(house.send("/api/delete", json.dumps({"model": name}).encode(), "DELETE"))


def test_a_file_that_was_sent_is_there_for_its_owner_alone(house: House, tmp_path: Path, weights: bytes) -> None:
    assert house.send(f"/api/blobs/{digest(weights)}", b"", "HEAD").status_code == 404
    send(house, weights)
    assert house.send(f"/api/blobs/{digest(weights)}", b"", "HEAD").status_code == 200
    (path,) = (tmp_path / "models" / "blobs").iterdir()
    assert path.read_bytes() == weights
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_file_that_is_there_already_is_left_as_it_is(house: House, tmp_path: Path, weights: bytes) -> None:
    send(house, weights)
    (path,) = (tmp_path / "models" / "blobs").iterdir()
    before = path.stat()
    send(house, weights, status=200)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_limit_of_bodies_is_not_for_files(tmp_path: Path) -> None:
    house, data = build_house(tmp_path, max_body=1000), bytes(3_000_000)
    send(house, data)
    assert blobs(tmp_path) == [digest(data)]
    assert "larger than 1000 bytes" in refused(house.send("/api/chat", data), 413)


def test_a_wrong_digest_is_refused_with_both_and_leaves_nothing(house: House, tmp_path: Path) -> None:
    sentence = refused(house.send(f"/api/blobs/{digest(b'good')}", b"evil"), 400)
    assert digest(b"good") in sentence
    assert digest(b"evil") in sentence
    assert blobs(tmp_path) == []


@pytest.mark.parametrize("name", ["sha256:123", "..", "sha256:" + "g" * 64, "md5:" + "0" * 64])
def test_what_is_no_digest_is_refused(house: House, name: str) -> None:
    assert "64 hexadecimal digits" in refused(house.send(f"/api/blobs/{name}", b"x"), 400)


def test_a_disk_without_room_is_a_507_and_keeps_nothing(disk: Disk) -> None:
    house = build_house(disk.path)
    assert "free" in refused(house.send(f"/api/blobs/{digest(bytes(2 << 20))}", bytes(2 << 20)), 507)
    files = ModelFiles(disk.path / "models" / "blobs")
    incoming = files.receive(digest(b""), None)
    with pytest.raises(Exception, match="is full"):
        incoming.write(bytes(2 << 20))
    incoming.close()
    assert blobs(disk.path) == []


def test_a_model_is_made_of_a_file_that_was_sent(house: House, tmp_path: Path, weights: bytes) -> None:
    assert create(house, "sent", files={"m.gguf": send(house, weights)}) == {"status": "success"}
    shown = ok(house.post("/api/show", model="sent"))
    assert shown["size"] == len(weights)
    assert Path(shown["path"]).parent == tmp_path / "models" / "blobs"


def test_a_create_that_is_streamed_ends_in_success(house: House, weights: bytes) -> None:
    response = house.post("/api/create", model="sent", files={"m.gguf": send(house, weights)}, stream=True)
    told = [line["status"] for line in lines(response)]
    assert told == [f"using existing layer {digest(weights)}", "parsing GGUF", "success"]
    bad = house.post("/api/create", model="bad", files={"m.gguf": send(house, b"no model")}, stream=True)
    assert "GGUF" in lines(bad)[-1]["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"files": {"m.gguf": digest(b"never sent")}}, "there is no sha256:"),
        ({"files": {"m.gguf": "../../etc/passwd"}}, "64 hexadecimal digits"),
        ({"files": {"a": "1", "b": "2"}}, "'files' has more than one"),
        ({"files": [1]}, "'files' must be an object"),
        ({"files": {"a": "1"}, "modelpath": "x"}, "'modelpath' and 'files'"),
        ({"from": "nosuch"}, "model 'nosuch' not found"),
        ({"from": "toy", "adapters": {"a": "1"}}, "'adapters' is not supported"),
        ({"from": "toy", "quantize": "q4_0"}, "'quantize' is not supported"),
        ({"from": "toy", "parameters": {"mirostat": 1}}, "'parameters.mirostat' is not supported"),
        ({"from": "toy", "parameters": {"top_p": 7}}, "'parameters.top_p' must be a number"),
        ({"from": "toy", "template": "{{ if .System }}{{ .System }}{{ end }}"}, "'template' has to be Jinja"),
    ],
)
def test_what_a_create_cannot_honour_is_named(house: House, body: dict[str, object], words: str) -> None:
    response = house.post("/api/create", model="m", **body)
    assert response.status_code in (400, 404)
    assert words in response.get_json()["error"]


def test_a_file_goes_with_the_last_name_that_uses_it(house: House, tmp_path: Path, weights: bytes) -> None:
    sent = send(house, weights)
    create(house, "a", files={"m.gguf": sent})
    create(house, "b", **{"from": "a"})
    delete(house, "a")
    assert blobs(tmp_path) == [sent]
    delete(house, "b")
    assert blobs(tmp_path) == []


def test_a_file_goes_when_its_name_gets_another_one(house: House, tmp_path: Path, weights: bytes) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(weights)
    create(house, "a", files={"m.gguf": send(house, weights)})
    create(house, "a", modelpath=str(own))
    assert blobs(tmp_path) == []
    delete(house, "a")
    assert own.read_bytes() == weights


def test_files_of_others_and_those_that_nobody_used_yet_stay(house: House, tmp_path: Path, weights: bytes) -> None:
    (tmp_path / "models" / "blobs").mkdir(parents=True)
    strange = tmp_path / "models" / "blobs" / "mine.gguf"
    strange.write_bytes(weights)
    sent = send(house, b"for later")
    create(house, "a", modelpath=str(strange))
    delete(house, "a")
    assert blobs(tmp_path) == sorted([sent, "mine.gguf"])


def test_what_a_dead_process_left_goes_with_the_next_file(house: House, tmp_path: Path, weights: bytes) -> None:
    files = ModelFiles(tmp_path / "models" / "blobs")
    coming = files.receive(digest(b"x"), None)
    left = files.folder / f"sha256-{'0' * 64}.0123.upload"
    left.touch()
    send(house, weights)
    assert not left.exists()
    coming.write(b"x")
    coming.keep()
    coming.close()
    assert blobs(tmp_path) == sorted([digest(weights), digest(b"x")])


SPOKEN = "{{ messages[0].content }}|{{ messages[-1].content }}"


@pytest.fixture
def brief(house: House, weights: bytes) -> House:
    """Has the model `brief`, whose name adds to its file."""
    preset = {"system": "Be brief.", "parameters": {"top_k": 7, "num_predict": 2}, "license": ["MIT", "mine"]}
    create(house, "brief", files={"m.gguf": send(house, weights)}, template=SPOKEN, **preset)
    return house


def test_a_preset_holds_where_a_request_says_nothing_else(brief: House) -> None:
    ok(brief.chat("hello", model="brief"))
    assert brief.engines.last.text == "Be brief.|hello"
    assert (brief.engines.request.sampling.top_k, brief.engines.request.max_tokens) == (7, 2)
    own = [{"role": "system", "content": "Go on."}, {"role": "user", "content": "hi"}]
    ok(brief.post("/api/chat", model="brief", options={"top_k": 9}, messages=own))
    assert brief.engines.last.text == "Go on.|hi"
    assert brief.engines.request.sampling.top_k == 9


def test_a_preset_is_shown(brief: House) -> None:
    shown = ok(brief.post("/api/show", model="brief"))
    assert (shown["system"], shown["license"], shown["template"]) == ("Be brief.", "MIT\n\nmine", SPOKEN)
    assert "top_k                          7" in shown["parameters"]


def test_a_preset_outlives_a_change_of_the_file(house: House, tmp_path: Path, weights: bytes) -> None:
    (tmp_path / "own.gguf").write_bytes(weights)
    create(house, "own", modelpath=str(tmp_path / "own.gguf"), system="Be kind.")
    create(house, "heir", **{"from": "own", "parameters": {"seed": 3}})
    os.utime(tmp_path / "own.gguf")
    ok(house.chat("hello", model="heir"))
    assert house.registry.get("heir").preset.system == "Be kind."
    assert house.engines.request.sampling.seed == 3


@pytest.mark.parametrize("method", ["HEAD", "POST"])
def test_who_may_only_chat_neither_sends_files_nor_asks_for_them(house: House, method: str) -> None:
    house.registry.add_api_key(ApiKey("guest", digest_of("secret"), "", may_manage=False))
    path = f"/api/blobs/{digest(b'x')}"
    assert house.send(path, b"x", method, Authorization="Bearer secret").status_code == 403
    assert house.send(path, b"x", method).status_code == 401


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("hasty") / "home", environ=SHORT)
    yield server
    assert server.stop() == 0


def begin(client: socket.socket, data: bytes, framing: bytes) -> None:
    client.sendall(b"POST /api/blobs/%b HTTP/1.1\r\nHost: localhost\r\n" % digest(data).encode() + framing)


def test_a_file_may_take_longer_than_other_bodies(hasty: Server) -> None:
    data = os.urandom(20)
    with connect(hasty) as client:
        begin(client, data, b"Content-Length: 20\r\nConnection: close\r\n\r\n")
        for byte in data:
            client.sendall(bytes([byte]))
            assert not readable(client, LIMIT_S / 5) or byte == data[-1]
        assert answer(client)[0].startswith(b"HTTP/1.1 201 ")
    assert digest(data) in blobs(hasty.home)


@pytest.mark.parametrize("framing", [b"Content-Length: 20\r\n\r\n", CHUNKED + b"4\r\nabcd\r\n"])
def test_a_file_that_stops_coming_is_cut_and_leaves_nothing(hasty: Server, framing: bytes) -> None:
    before = blobs(hasty.home)
    with connect(hasty) as client:
        begin(client, b"abcdefgh", framing)
        head, body = answer(client)
    assert head.startswith(b"HTTP/1.1 408 ")
    assert "stopped coming" in json.loads(body)["error"]
    assert blobs(hasty.home) == before


@pytest.mark.parametrize("framing", [b"Content-Length: 2000000\r\n\r\n", CHUNKED + b"1e8480\r\n"])
def test_a_connection_that_breaks_leaves_nothing(server: Server, framing: bytes) -> None:
    with connect(server) as client:
        begin(client, b"abcdefgh", framing + bytes(1_500_000))
        until(lambda: blobs(server.home) != [])
    until(lambda: blobs(server.home) == [])
    assert "Traceback" not in server.log.read_text()


def test_a_connection_goes_on_after_a_file_that_was_there_already(server: Server, weights: bytes) -> None:
    url = f"{server.url}/api/blobs/{digest(weights)}"
    with requests.Session() as session:
        assert [session.post(url, data=weights, timeout=30).status_code for _ in range(2)] == [201, 200]
        assert session.head(url, timeout=30).status_code == 200
    (server.home / "models" / "blobs" / digest(weights).replace(":", "-")).unlink()


def test_a_process_that_dies_leaves_no_file_that_is_not_whole(tmp_path: Path, weights: bytes) -> None:
    server = start_server(tmp_path / "home")
    with connect(server) as client:
        begin(client, weights, b"Content-Length: %d\r\n\r\n" % (len(weights) + 1))
        client.sendall(weights)
        until(lambda: blobs(server.home) != [])
        os.kill(server.worker_pid, signal.SIGKILL)
        assert answer(client) == (b"", b"")
    until(lambda: requests.post(f"{server.url}/api/blobs/{digest(b'x')}", data=b"x", timeout=30).ok)
    assert blobs(server.home) == [digest(b"x")]
    assert server.stop() == 0


@needs_nginx
def test_a_file_larger_than_other_bodies_comes_through_nginx(server: Server, tmp_path: Path) -> None:
    data = bytes(21 << 20)
    with Nginx(tmp_path, upstream=server.url.removeprefix("http://")) as nginx:
        assert nginx.ask("POST", f"/api/blobs/{digest(data)}", data).status == 201
        assert nginx.ask("POST", "/api/chat", data).status == 413
    (server.home / "models" / "blobs" / digest(data).replace(":", "-")).unlink()
