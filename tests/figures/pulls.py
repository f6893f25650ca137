"""What a pull costs, of a file from nginx over loopback: beside curl, hashed and brought to the disk; and a chat."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from rustllama.pull.messages import Message, Order
from tests.figures.serving import ask, median, serving
from tests.nginx_files import nginx

_PIECE_BYTES = 1 << 20
_LINE_BYTES, _LINE_RATE = 1_200_000_000, "30m"  # of a file, and of each of its four connections
_ANSWER = 200  # tokens, which a slow machine generates before the pull ends


def measure(size_bytes: int, rounds: int) -> None:
    """Prints megabytes a second of both, taken in turns, and the ratio of the medians."""
    with _file(size_bytes) as (folder, url):
        pairs = [(_curl(url, folder), _pull(url, folder / f"models-{number}")) for number in range(rounds)]
    rates = [size_bytes / 1e6 / statistics.median(times) for times in zip(*pairs, strict=True)]
    click.echo(f"curl {rates[0]:.0f} MB/s, pull {rates[1]:.0f} MB/s: {rates[1] / rates[0]:.2f}")


def beside(path: Path, rounds: int) -> None:
    """Tokens/s of a chat while a pull takes a whole line of a gigabit, against those of the same chat alone."""
    ratios = []
    with serving(path, NUM_CTX="1024") as server, _file(_LINE_BYTES, f"limit_rate {_LINE_RATE};") as (folder, url):
        for number in range(rounds):
            alone = ask(server, path, "hello", num_predict=_ANSWER).tokens_per_s
            with _order(url, folder / f"beside-{number}") as process:
                beside = ask(server, path, "hello", num_predict=_ANSWER).tokens_per_s
                assert process.poll() is None, "the pull ended first"
                process.kill()
            print(f"beside a pull {beside:.1f} tokens/s, alone {alone:.1f}", flush=True)
            ratios.append(beside / alone)
    print(f"a chat beside a pull: {median(ratios)} of its rate alone")


@contextmanager
def _file(size_bytes: int, locations: str = "") -> Iterator[tuple[Path, str]]:
    """A folder, and the address of a file of that size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "model.gguf").open("wb") as file:
            for _ in range(size_bytes // _PIECE_BYTES):
                file.write(os.urandom(_PIECE_BYTES))
        with nginx(folder, locations) as port:
            yield folder, f"http://127.0.0.1:{port}/model.gguf"


def _curl(url: str, folder: Path) -> float:
    """Seconds."""
    started_s = time.monotonic()
    with (folder / "curl.out").open("wb") as file:
        subprocess.run(["curl", "-sS", url], stdout=file, check=True)
        os.fsync(file.fileno())
    return time.monotonic() - started_s


def _pull(url: str, folder: Path) -> float:
    """Seconds from the first byte on: Python's start is left out."""
    with _order(url, folder) as process:
        assert process.stdout is not None
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


def _order(url: str, folder: Path) -> subprocess.Popen[bytes]:
    """The process of a pull, as a server starts it."""
    command = [sys.executable, "-m", "rustllama.pull_child"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(Order(url, str(folder))) + b"\n")
    process.stdin.flush()
    return process
