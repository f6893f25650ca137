"""How fast a pull is beside curl: the same file from nginx over loopback, hashed and brought to the disk."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import msgspec

from rustllama.pull.messages import Message, Order
from tests.nginx_files import nginx

_PIECE_BYTES = 1 << 20


def measure(size_bytes: int, rounds: int) -> None:
    """Prints megabytes a second of both, taken in turns, and the ratio of the medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "model.gguf").open("wb") as file:
            for _ in range(size_bytes // _PIECE_BYTES):
                file.write(os.urandom(_PIECE_BYTES))
        with nginx(folder) as port:
            url = f"http://127.0.0.1:{port}/model.gguf"
            pairs = [(_curl(url, folder), _pull(url, folder / f"models-{number}")) for number in range(rounds)]
    rates = [size_bytes / 1e6 / statistics.median(times) for times in zip(*pairs, strict=True)]
    click.echo(f"curl {rates[0]:.0f} MB/s, pull {rates[1]:.0f} MB/s: {rates[1] / rates[0]:.2f}")


def _curl(url: str, folder: Path) -> float:
    """Seconds."""
    started_s = time.monotonic()
    with (folder / "curl.out").open("wb") as file:
        subprocess.run(["curl", "-sS", url], stdout=file, check=True)
        os.fsync(file.fileno())
    return time.monotonic() - started_s


def _pull(url: str, folder: Path) -> float:
    """Seconds from the first byte on: Python's start is left out."""
    order = msgspec.json.encode(Order(url, str(folder))) + b"\n"
    command = [sys.executable, "-m", "rustllama.pull_child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(order)
        process.stdin.flush()
        started_s = 0.0
        for line in process.stdout:
            message = msgspec.json.decode(line, type=Message)
            if message.progress is not None and message.progress.total and not started_s:
                started_s = time.monotonic()
            assert message.failure is None, message.failure
            if message.fetched is not None:
                ended_s = time.monotonic()
                Path(message.fetched.paths[0]).unlink()
                return ended_s - started_s
    raise AssertionError("the pull's process ended")
