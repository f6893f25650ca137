"""Debian's nginx, serving the files of a folder."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.hosts import listens
from tests.nginx import NGINX


@contextlib.contextmanager
def nginx(folder: Path, locations: str = "") -> Iterator[int]:
    """At a port of 127.0.0.1; `locations` stand in the server's block beside the files."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = folder / "nginx"
    own.mkdir()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {own}/{kind};\n" for kind in kinds)
    (own / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {own}/pid; error_log stderr;\nevents {{}}\nhttp {{\n"
        f"access_log off; sendfile on;\n{temporary}"
        f"server {{ listen 127.0.0.1:{port}; root {folder};\n{locations}\n}}\n}}\n"
    )
    command = [str(NGINX), "-e", "stderr", "-p", str(own), "-c", str(own / "nginx.conf")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            while not listens(port):
                assert process.poll() is None
            yield port
        finally:
            process.terminate()
