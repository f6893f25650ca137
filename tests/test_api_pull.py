"""Pulling over HTTP, with a real server: progress, sharing, leaving, what is kept and what is deleted."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ollama
import pytest
import requests

from tests.conftest import Server, start_server
from tests.hosts import Handler, Host, hosting
from tests.hub import publish
from tests.scripted import PATIENCE_S
from tests.toys import CHATML, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", chat_template=CHATML).read_bytes()


@pytest.fixture(scope="module")
def hub() -> Iterator[Host]:
    with hosting() as host:
        yield host


@pytest.fixture(scope="module")
def puller(tmp_path_factory: pytest.TempPathFactory, hub: Host) -> Iterator[Server]:
    running = start_server(tmp_path_factory.mktemp("home"), environ={"HF_ENDPOINT": hub.url})
    yield running
    assert running.stop() == 0


@pytest.fixture(autouse=True)
def _tidy_hub(hub: Host, puller: Server, toy: bytes) -> Iterator[None]:
    publish(hub, "user/toy-GGUF", {"toy-Q4_K_M.gguf": toy})
    hub.files["/toy.gguf"] = toy
    yield
    hub.faults.clear()
    hub.sent_bytes = 0
    for model in models(puller):
        requests.delete(f"{puller.url}/api/delete", json={"name": model["name"]}, timeout=PATIENCE_S)


def pull(server: Server, **body: object) -> list[dict[str, Any]]:
    answer = requests.post(f"{server.url}/api/pull", json={"stream": True, **body}, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def models(server: Server) -> list[dict[str, Any]]:
    listed = requests.get(f"{server.url}/api/list", timeout=PATIENCE_S).json()["models"]
    return [model for model in listed if model["name"] != "demo"]


def kept(server: Server) -> list[Path]:
    return sorted((server.home / "models" / "blobs").glob("sha256-*"))


def test_a_pull_tells_its_steps_and_ends_with_success(puller: Server, toy: bytes) -> None:
    lines = pull(puller, model="hf.co/user/toy-GGUF")
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[-1] == {"status": "success", "model": "hf.co/user/toy-GGUF"}
    (model,) = models(puller)
    assert (model["name"], model["origin"]) == ("hf.co/user/toy-GGUF", "hf.co/user/toy-GGUF:Q4_K_M")
    whole = [line for line in lines if line.get("completed") == len(toy)]
    assert whole[0] == {
        "status": f"pulling {model['sha256'][:12]}",
        "digest": f"sha256:{model['sha256']}",
        "total": len(toy),
        "completed": len(toy),
    }
    shown = requests.post(f"{puller.url}/api/show", json={"model": model["name"]}, timeout=PATIENCE_S).json()
    assert (shown["origin"], shown["license"]) == (model["origin"], "apache-2.0")


def test_the_official_client_pulls_and_chats(puller: Server) -> None:
    with closing(ollama.Client(host=puller.url)) as client:
        lines = list(client.pull("hf.co/user/toy-GGUF", stream=True))
        assert lines[-1].status == "success"
        assert any(line.completed and line.completed == line.total for line in lines)
        assert client.pull("hf.co/user/toy-GGUF").status == "success"
        assert client.chat("hf.co/user/toy-GGUF", [{"role": "user", "content": "hi"}]).done


def test_two_clients_share_one_transfer(puller: Server, hub: Host, toy: bytes) -> None:
    met, go = threading.Event(), threading.Event()

    def wait(handler: Handler, _: bytes) -> None:
        met.set()
        go.wait(PATIENCE_S)
        handler.do_GET()

    hub.faults.append(wait)
    ends: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: ends.append(pull(puller, model=f"{hub.url}/toy.gguf")[-1])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert met.wait(PATIENCE_S)
    go.set()
    for thread in threads:
        thread.join()
    assert [end["status"] for end in ends] == ["success"] * 3
    assert hub.sent_bytes < 2 * len(toy)


def test_the_last_client_that_leaves_ends_the_pull_and_the_next_goes_on(puller: Server, hub: Host, toy: bytes) -> None:
    met, gone = threading.Event(), threading.Event()

    def watch(handler: Handler, _: bytes) -> None:
        met.set()
        handler.connection.settimeout(PATIENCE_S)
        if handler.connection.recv(1) == b"":
            gone.set()
        handler.close_connection = True

    hub.faults.append(watch)
    url = f"{puller.url}/api/pull"
    body = {"model": f"{hub.url}/toy.gguf", "stream": True}
    with requests.post(url, json=body, stream=True, timeout=PATIENCE_S) as answer:
        lines = answer.iter_lines()
        told = list(itertools.takewhile(lambda line: b'"total"' not in line, lines))  # the disk may take its time
        assert met.wait(PATIENCE_S), told
    assert gone.wait(PATIENCE_S)
    assert models(puller) == []
    assert pull(puller, model=f"{hub.url}/toy.gguf")[-1]["status"] == "success"


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="the kernel does not group by sessions")
def test_the_process_of_a_pull_and_its_session_give_way_to_the_answers(puller: Server, hub: Host) -> None:
    nice = list[list[str]]()

    def look(handler: Handler, _: bytes) -> None:
        (pid,) = (pid for pid in children(puller.worker_pid) if b"rustllama.pull_child" in of(pid, "cmdline"))
        nice.append([str(os.getpriority(os.PRIO_PROCESS, int(pid))), of(pid, "autogroup").decode().split()[-1]])
        handler.do_GET()

    hub.faults.append(look)
    assert pull(puller, model=f"{hub.url}/toy.gguf")[-1]["status"] == "success"
    assert nice == [["19", "19"]]


def children(pid: int) -> list[str]:
    return [pid for task in Path(f"/proc/{pid}/task").iterdir() for pid in (task / "children").read_text().split()]


def of(pid: str, what: str) -> bytes:
    return Path(f"/proc/{pid}/{what}").read_bytes()


def test_what_is_no_model_is_told_and_leaves_nothing(puller: Server, hub: Host) -> None:
    hub.files["/toy.gguf"] = b"<html>not here</html>" * 1000
    assert "GGUF" in pull(puller, model=f"{hub.url}/toy.gguf")[-1]["error"]
    assert models(puller) == []
    assert kept(puller) == []


def test_removing_the_last_name_deletes_what_was_pulled(puller: Server) -> None:
    for name in ("one", "two"):
        pull(puller, model="hf.co/user/toy-GGUF", **{"as": name})
    assert len(kept(puller)) == 1
    for name, count in (("one", 1), ("two", 0)):
        requests.delete(f"{puller.url}/api/delete", json={"name": name}, timeout=PATIENCE_S)
        assert len(kept(puller)) == count


def test_a_file_of_the_users_is_never_deleted(puller: Server, tmp_path: Path, toy: bytes) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(toy)
    inside = puller.home / "models" / "blobs" / "mine.gguf"
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.write_bytes(toy)
    for path in (mine, inside):
        for method, url, body in (
            ("POST", "/api/create", {"name": "mine", "modelpath": str(path)}),
            ("DELETE", "/api/delete", {"name": "mine"}),
        ):
            requests.request(method, puller.url + url, json=body, timeout=PATIENCE_S).raise_for_status()
        assert path.exists()
    inside.unlink()


def test_pulling_a_name_again_replaces_its_file(puller: Server, hub: Host, tmp_path: Path) -> None:
    pull(puller, model=f"{hub.url}/toy.gguf")
    (old,) = kept(puller)
    hub.files["/toy.gguf"] = write_toy(tmp_path / "other.gguf", chat_template=CHATML + "{# new #}").read_bytes()
    pull(puller, model=f"{hub.url}/toy.gguf")
    (new,) = kept(puller)
    assert new != old
    (model,) = models(puller)
    assert model["path"] == str(new)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "llama3.2"}, "RUSTLLAMA_REGISTRY"),
        ({}, "name one like hf.co/USER/REPO"),
        ({"model": "hf.co/u/r", "insecure": True}, "https that is verified"),
        ({"model": "hf.co/u/r", "as": "a b"}, "is not a name"),
        ({"model": 1}, "'model' must be a string"),
    ],
)
def test_what_cannot_be_pulled_is_a_400(puller: Server, body: dict[str, object], words: str) -> None:
    answer = requests.post(f"{puller.url}/api/pull", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_an_unstreamed_pull_has_the_status_of_what_went_wrong(puller: Server) -> None:
    answer = requests.post(f"{puller.url}/api/pull", json={"model": "hf.co/no/body"}, timeout=PATIENCE_S)
    assert (answer.status_code, list(answer.json())) == (404, ["error"])


def test_a_server_for_other_machines_takes_nothing_from_its_own(hub: Host, tmp_path: Path) -> None:
    environ = {"RUSTLLAMA_HOST": "0.0.0.0:0", "RUSTLLAMA_INSECURE_NO_AUTH": "1"}
    server = start_server(tmp_path, environ=environ)
    port = server.url.rpartition(":")[2]
    body = {"model": f"{hub.url}/toy.gguf"}
    answer = requests.post(f"http://127.0.0.1:{port}/api/pull", json=body, timeout=PATIENCE_S)
    assert server.stop() == 0
    assert answer.status_code == 400
    assert "private network" in answer.json()["error"]
