"""A server that is used for long, in all ways at once, is the same at the end: memory, threads and files."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests

from rustllama.bridge import FILE_THREADS
from tests.conftest import Server
from tests.hazards import times
from tests.hazards.conftest import Start, integrity
from tests.hazards.table import Row
from tests.hazards.visitor import MODELS, Visitor
from tests.test_degraded import ask, create, good, under_way
from tests.test_serve import until

REQUESTS, WARM_UP = times(20_000, 160), times(5_000, 40)
CLIENTS = 8
SETTINGS = {"NUM_CTX": 512, "PROMPT_CACHE_MEMORY": "8MB", "PROMPT_CACHE_DISK": "8MB"}


@dataclass(frozen=True, slots=True)
class Usage:
    """Of the worker, with both models loaded and nothing to do."""

    rss_bytes: int
    files: int  # open, but for those of the database
    connections: int  # to the database: each thread makes one at its first need
    threads: int


def test_20000_mixed_requests(row: Row, start: Start, toys: dict[str, Path]) -> None:
    server = start(**SETTINGS)
    for name, file in zip(MODELS, (toys["llama"], toys["mamba"]), strict=True):
        good(create(server, name, file))
    worker = server.worker_pid
    before = _visited(server, toys["llama"], 0, WARM_UP)
    after = _visited(server, toys["llama"], WARM_UP, REQUESTS)
    row.is_within("RSS after warm-up", 100 * (after.rss_bytes / before.rss_bytes - 1), 5, " %")
    row.is_within("files, more or fewer", abs(after.files - before.files), 2, "")
    row.is_at_most("connections to the database", after.connections, FILE_THREADS)
    row.is_within("threads, more or fewer", abs(after.threads - before.threads), 2, "")
    row.is_at_most("deaths", server.log.read_text().count(" died of ") + (server.worker_pid != worker), 0)
    assert integrity(server) == "ok"


def _visited(server: Server, file: Path, first: int, end: int) -> Usage:
    """What the server uses when these requests are answered."""

    def visit(number: int) -> None:
        with requests.Session() as session:
            visitor = Visitor(server.url, f"visitor{number}", file, random.Random(first + number), session)
            for _ in range((end - first) // CLIENTS):
                visitor.visit()

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(visit, range(CLIENTS)))
    for name in MODELS:
        good(ask(server, "POST", "/api/chat", {"model": name}))  # it is loaded
    until(lambda: not under_way(server))
    return _usage(server)


def _usage(server: Server) -> Usage:
    process, database = Path(f"/proc/{server.worker_pid}"), str(server.home / "rustllama.db")
    lines = (process / "status").read_text().splitlines()
    numbers = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "Threads"))}
    files = [name for fd in (process / "fd").iterdir() if (name := _target(fd))]
    connections, others = files.count(database), sum(not name.startswith(database) for name in files)
    return Usage(int(numbers["VmRSS"]) * 1024, others, connections, int(numbers["Threads"]))


def _target(fd: Path) -> str:
    """What a descriptor stands for; empty when it is closed meanwhile."""
    with suppress(FileNotFoundError):
        return os.readlink(fd)
    return ""
