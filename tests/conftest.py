"""What many tests share: a real server in a process of its own, and toy models."""

from __future__ import annotations

import gc
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.disks import Disk, small_disk
from tests.toys import GEMMA3, JAMBA, LLAMA, MAMBA, write_toy

READY_S = 60
SERVE = ("-m", "rustllama", "serve")
SHAPES = {"llama": LLAMA, "gemma3": GEMMA3, "mamba": MAMBA, "jamba": JAMBA}


@dataclass(frozen=True, slots=True)
class Server:
    """A running `rustllama serve`."""

    url: str
    home: Path
    process: subprocess.Popen[str]
    log: Path

    @property
    def worker_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def stop(self) -> int:
        """Ends it gracefully and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


@dataclass(frozen=True, slots=True)
class Certificate:
    """Self-signed, for 127.0.0.1."""

    cert: Path
    key: Path

    @property
    def environ(self) -> dict[str, str]:
        return {"RUSTLLAMA_TLS_CERT": str(self.cert), "RUSTLLAMA_TLS_KEY": str(self.key)}


def start_server(
    home: Path, *arguments: str, environ: Mapping[str, str] | None = None, program: Sequence[str] = SERVE
) -> Server:
    """`rustllama serve` on a free loopback port, with a state folder of its own; returns when it is ready.

    `program` is what Python runs in its place.
    """
    home.mkdir(exist_ok=True)
    log = home / "serve.log"
    variables = {**os.environ, "RUSTLLAMA_HOME": str(home), "RUSTLLAMA_HOST": "127.0.0.1:0", **(environ or {})}
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:  # select() knows no more than 1,024 files
        ready.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if ready.select(READY_S) else ""
    found = re.search(r"https?://\S+", line)
    if not found:
        process.kill()
        process.wait()
        raise AssertionError(f"the server did not start: {line}{log.read_text()}")
    return Server(found.group(), home, process, log)


@pytest.fixture(autouse=True, scope="module")
def _tidy() -> Iterator[None]:
    """The databases of a module's registries are closed, one connection for each thread that used them."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that change nothing of it; it has the bundled model, `demo`."""
    running = start_server(tmp_path_factory.mktemp("home"))
    yield running
    assert running.stop() == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk") as made:
        yield made


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    made = Certificate(folder / "cert.pem", folder / "key.pem")
    what = ["-x509", "-nodes", "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-keyout",
        str(made.key),
        "-out",
        str(made.cert),
    ]
    subprocess.run([openssl, "req", *what, *kind], check=True, capture_output=True)
    return made


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """F32 toys by architecture: full attention, sliding window, recurrent, hybrid."""
    folder = tmp_path_factory.mktemp("toys")
    return {name: write_toy(folder / f"{name}.gguf", shape) for name, shape in SHAPES.items()}
