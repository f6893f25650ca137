"""What a pull costs, of a file from nginx over loopback: beside curl, hashed and brought to the disk; and a chat."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click

from rustllama.pull.messages import Order, PullProcess
from rustllama.pull.progress import Progress
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
            with _pulling(url, folder / f"beside-{number}") as fetched_bytes:
                before_bytes, started_s = fetched_bytes(), time.monotonic()
                beside = ask(server, path, "hello", num_predict=_ANSWER).tokens_per_s
                rate = (fetched_bytes() - before_bytes) / 1e6 / (time.monotonic() - started_s)
            print(f"beside a pull {beside:.1f} tokens/s, alone {alone:.1f}; it got {rate:.0f} MB/s", flush=True)
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
    started_s = list[float]()

    def tell(progress: Progress) -> None:
        if progress.total and not started_s:
            started_s.append(time.monotonic())

    (path,) = PullProcess(Order(url, str(folder))).run(tell).paths
    took_s = time.monotonic() - started_s[0]
    Path(path).unlink()
    return took_s


@contextmanager
def _pulling(url: str, folder: Path) -> Iterator[Callable[[], int]]:
    """What a pull has fetched at any moment, in bytes; it runs until the `with` ends, or the `with` fails."""
    completed, begun = [0], threading.Event()

    def tell(progress: Progress) -> None:
        completed[0] = progress.completed
        if progress.total:
            begun.set()

    process = PullProcess(Order(url, str(folder)))
    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(process.run, tell)
        pull.add_done_callback(lambda _: begun.set())
        begun.wait()
        try:
            yield lambda: completed[0]
            assert not pull.done(), "the pull ended first"
        finally:
            process.end()
