"""Pages in a real browser, Debian's Chromium: what one of another site tries, and one that the server knows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue

import pytest
import requests

from tests.conftest import Server, start_server
from tests.test_serve import until

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PATIENCE_S = 60
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
NAMES = "--host-resolver-rules=MAP *.example 127.0.0.1"
PAGE = (Path(__file__).parent / "data" / "page.html").read_bytes()


class Site:
    """A web server of somebody else, which hears what came of its page's tries."""

    def __init__(self) -> None:
        self.told: SimpleQueue[dict[str, str]] = SimpleQueue()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(PAGE)

            def do_POST(self) -> None:
                site.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._answer(b"")

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def origin(self, name: str) -> str:
        return f"http://{name}.example:{self.httpd.server_port}"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    serving = threading.Thread(target=made.httpd.serve_forever)
    serving.start()
    yield made
    made.httpd.shutdown()
    serving.join()
    made.httpd.server_close()


@pytest.fixture(scope="module")
def server(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On loopback, without keys, as most are; it knows the pages of chat.example."""
    running = start_server(tmp_path_factory.mktemp("home"), environ={"RUSTLLAMA_ORIGINS": site.origin("chat")})
    yield running
    assert running.stop() == 0


@contextmanager
def opened(profile: Path, url: str) -> Iterator[None]:
    command = [str(CHROMIUM), *OPTIONS, NAMES, f"--user-data-dir={profile}", url]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as browser:
        try:
            yield
        finally:
            browser.terminate()


def visit(site: Site, name: str, server: Server, profile: Path) -> tuple[dict[str, str], dict[tuple[str, str], int]]:
    """What the page saw, and the statuses that the server's log has of it."""
    begin = server.log.stat().st_size
    with opened(profile, f"{site.origin(name)}/#{server.url}"):
        told = site.told.get(timeout=PATIENCE_S)
    until(lambda: " POST /api/generate " in server.log.read_text()[begin:])
    lines = re.findall(r" ([A-Z]+) (/\S+) (\d{3}) ", server.log.read_text()[begin:])
    return told, {(method, path): int(status) for method, path, status in lines}


def test_a_page_of_another_site_gets_nothing_and_does_nothing(site: Site, server: Server, tmp_path: Path) -> None:
    told, statuses = visit(site, "evil", server, tmp_path)
    kinds = ("get", "simple", "preflighted", "remove", "image")
    assert {kind: told[kind] for kind in kinds} == dict.fromkeys(kinds, "failed")
    asked = [("GET", "/api/list"), ("GET", "/api/tags"), ("GET", "/api/version")]
    asked += [("POST", "/api/show"), ("POST", "/api/generate"), ("OPTIONS", "/api/chat"), ("OPTIONS", "/api/delete")]
    assert statuses == dict.fromkeys(asked, 403)


def test_a_page_that_the_server_knows_works(site: Site, server: Server, tmp_path: Path) -> None:
    told, statuses = visit(site, "chat", server, tmp_path)
    assert '"name":"demo"' in told["get"]
    assert told["simple"].startswith("200 ")
    assert json.loads(told["preflighted"].removeprefix("200 "))["message"]["content"]
    assert told["remove"].startswith("404 ")
    assert (statuses["OPTIONS", "/api/chat"], statuses["POST", "/api/chat"]) == (204, 200)
    assert (statuses["OPTIONS", "/api/delete"], statuses["DELETE", "/api/delete"]) == (204, 404)


def test_a_name_that_was_made_to_lead_here_opens_nothing(server: Server, tmp_path: Path) -> None:
    def shown(url: str) -> str:
        command = [str(CHROMIUM), *OPTIONS, NAMES, f"--user-data-dir={tmp_path}", "--dump-dom", url]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout

    assert '"name":"demo"' in shown(f"{server.url}/api/list")
    assert "RUSTLLAMA_HOSTS" in shown(server.url.replace("127.0.0.1", "rebound.example") + "/api/list")


def test_the_model_is_still_there(server: Server) -> None:
    names = [model["name"] for model in requests.get(server.url + "/api/list", timeout=PATIENCE_S).json()["models"]]
    assert names == ["demo"]
