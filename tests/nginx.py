"""Debian's nginx with the site of deploy/, in front of a server that a test names."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.scripted import PATIENCE_S

DEPLOY = Path(__file__).parent.parent / "deploy"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(self._path)


class Nginx:
    """Debian's nginx with our site, on a socket in a folder of its own."""

    def __init__(self, folder: Path, upstream: str) -> None:
        self.socket = folder / "nginx.sock"
        site = (DEPLOY / "nginx.conf").read_text()
        for ours, tests in {"listen 80;": f"listen unix:{self.socket};", "127.0.0.1:11435": upstream}.items():
            assert ours in site
            site = site.replace(ours, tests)
        folders = "".join(
            f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = folder / "nginx.conf"
        config.write_text(
            f"daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;\n"
            f"events {{}}\nhttp {{\naccess_log off;\n{folders}{site}\n}}\n"
        )
        self.command = [str(NGINX), "-e", "stderr", "-p", str(folder), "-c", str(config)]

    def send(
        self, method: str, path: str, body: bytes | None = None, host: str = "localhost", request_id: str = ""
    ) -> http.client.HTTPConnection:
        connection = self._connections.enter_context(contextlib.closing(_UnixConnection(self.socket)))
        connection.request(method, path, body, headers={"Host": host, "X-Request-Id": request_id})
        return connection

    def ask(
        self, method: str, path: str, body: bytes | None = None, host: str = "localhost", request_id: str = ""
    ) -> http.client.HTTPResponse:
        return self._connections.enter_context(self.send(method, path, body, host, request_id).getresponse())

    def hang_up(self) -> None:
        self._connections.close()

    def __enter__(self) -> Nginx:
        self._connections = contextlib.ExitStack()
        self._process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        while not self._listens():
            assert self._process.poll() is None, self._process.communicate()
        return self

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE_S)
