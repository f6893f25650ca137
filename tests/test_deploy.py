"""What stands in deploy/, run by the programs it is written for where they are installed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rustllama.settings import DEFAULT_PORT, Settings
from tests.conftest import Server
from tests.nginx import DEPLOY, Nginx, needs_nginx
from tests.scripted import PATIENCE_S, ollama_answer, serving


def _chat(num_predict: int = 3) -> bytes:
    messages = [{"role": "user", "content": "why is the sky blue?"}]
    body = {"model": "demo", "messages": messages, "stream": True, "options": {"num_predict": num_predict}}
    return json.dumps(body).encode()


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()
    return f"{host}:{port}"


@needs_nginx
def test_nginx_accepts_the_site(tmp_path: Path) -> None:
    nginx = Nginx(tmp_path, "127.0.0.1:11435")
    done = subprocess.run([*nginx.command, "-t"], capture_output=True, text=True, check=False)
    assert "syntax is ok" in done.stderr
    assert "warn" not in done.stderr


@needs_nginx
@pytest.mark.parametrize("chunked", [True, False])
def test_each_token_goes_through_nginx_before_the_next_is_made(tmp_path: Path, chunked: bool) -> None:
    seen = threading.Semaphore(0)

    def lockstep(body: dict[str, Any]) -> Iterator[bytes]:
        for line in ollama_answer(body):
            yield line
            assert seen.acquire(timeout=PATIENCE_S)

    with serving(lockstep, chunked=chunked) as url, Nginx(tmp_path, urlsplit(url).netloc) as nginx:
        answer = nginx.ask("POST", "/api/chat", _chat())
        lines = []
        for line in iter(answer.readline, b""):
            lines.append(json.loads(line))
            seen.release()
    assert [line["done"] for line in lines] == [False, False, False, True]


@needs_nginx
def test_the_bundled_model_streams_its_answer_through_nginx(tmp_path: Path, server: Server) -> None:
    with Nginx(tmp_path, urlsplit(server.url).netloc) as nginx:
        answer = nginx.ask("POST", "/api/chat", _chat(num_predict=20))
        lines = [json.loads(line) for line in iter(answer.readline, b"")]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(lines) > 5
    assert "".join(line["message"]["content"] for line in lines)


@needs_nginx
@pytest.mark.parametrize(("host", "status"), [("localhost", 200), ("box.local:8443", 200), ("chat.example.com", 403)])
def test_nginx_leaves_it_to_the_server_which_names_are_its_own(
    tmp_path: Path, server: Server, host: str, status: int
) -> None:
    with Nginx(tmp_path, urlsplit(server.url).netloc) as nginx:
        answer = nginx.ask("GET", "/api/list", host=host)
        body = answer.read()
    assert answer.status == status
    assert status == 200 or b"'chat.example.com'" in body


@needs_nginx
def test_a_client_that_hangs_up_at_nginx_is_gone_for_a_server_that_still_computes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as computing, Nginx(tmp_path, _address(computing)) as nginx:
        nginx.send("POST", "/api/chat", _chat())
        connection, _ = computing.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            while b"num_predict" not in connection.recv(65536):
                pass
            nginx.hang_up()
            assert connection.recv(1) == b""


@needs_nginx
def test_a_generation_whose_connection_dies_is_not_asked_for_again(tmp_path: Path) -> None:
    asked: list[bytes] = []

    def die_at_the_second(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            asked.append(connection.recv(65536))

    with socket.create_server(("127.0.0.1", 0)) as dying, Nginx(tmp_path, _address(dying)) as nginx:
        thread = threading.Thread(target=die_at_the_second, args=(dying,))
        thread.start()
        nginx.ask("GET", "/api/list").read()
        answer = nginx.ask("POST", "/api/chat", _chat())
        thread.join()
        dying.setblocking(False)
        with pytest.raises(BlockingIOError):
            dying.accept()
    assert (answer.status, len(asked)) == (503, 1)


@needs_nginx
def test_what_nginx_refuses_itself_is_json(tmp_path: Path) -> None:
    with Nginx(tmp_path, "127.0.0.1:1") as nginx:
        absent = nginx.ask("GET", "/api/list")
        large = nginx.ask("POST", "/api/chat", b" " * 21_000_000)
        for answer, status in ((absent, 503), (large, 413)):
            assert answer.status == status
            assert json.loads(answer.read())["error"]
    assert absent.getheader("Retry-After") == "2"


def test_the_site_agrees_with_the_settings() -> None:
    site = (DEPLOY / "nginx.conf").read_text()
    assert f"server 127.0.0.1:{DEFAULT_PORT} " in site
    assert f"client_max_body_size {Settings().max_body // 1024**2}m;" in site
    assert f"client_header_timeout {Settings().head_timeout:g}s;" in site
    assert f"client_body_timeout {Settings().body_timeout:g}s;" in site
    assert f"send_timeout {Settings().write_timeout:g}s;" in site


def test_the_unit_waits_longer_than_answers_may_take_to_drain() -> None:
    unit = (DEPLOY / "rustllama.service").read_text()
    stop_s = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop_s
    assert int(stop_s[1]) > Settings().drain_timeout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "rustllama.service"
    text = (DEPLOY / "rustllama.service").read_text()
    unit.write_text(text.replace("/opt/rustllama/bin/rustllama", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
