"""What all rows share: the row itself, and servers that must still be the same when a row is over."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import requests

from tests.conftest import SERVE, Server, start_server
from tests.hazards.table import Row, lines

PATIENCE_S = 60
_ROWS = pytest.StashKey[list[Row]]()

Start = Callable[..., Server]


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """Where a test notes its figures; they are judged at its end."""
    made = Row(request.node.nodeid, request.node.name.removeprefix("test_").replace("_", " "))
    request.config.stash.setdefault(_ROWS, []).append(made)
    yield made
    made.check()


@pytest.fixture
def start(tmp_path: Path, row: Row) -> Iterator[Start]:
    """Starts a server (`RUSTLLAMA_*` settings without that prefix), which must live and answer when the row is over."""
    with ExitStack() as servers:

        def start(*arguments: str, program: Sequence[str] = SERVE, **settings: object) -> Server:
            environ = {f"RUSTLLAMA_{name}": str(value) for name, value in settings.items()}
            home = tmp_path / str(len(list(tmp_path.iterdir())))
            server = start_server(home, *arguments, environ=environ, program=program)
            servers.enter_context(_surviving(server, row))
            return server

        yield start


def integrity(server: Server) -> str:
    """What SQLite says of the database; "ok" where nothing is wrong."""
    with closing(sqlite3.connect(server.home / "rustllama.db")) as database:
        return str(database.execute("PRAGMA integrity_check").fetchone()[0])


@contextmanager
def _surviving(server: Server, row: Row) -> Iterator[None]:
    try:
        yield
        assert server.process.poll() is None, "the master is gone"
        began_s = time.perf_counter()
        assert requests.get(f"{server.url}/api/version", timeout=PATIENCE_S).status_code == 200
        row.is_within("/api/version afterwards", (time.perf_counter() - began_s) * 1e3, 1_000)
        assert "Traceback" not in server.log.read_text()
    finally:
        assert server.stop() == 0


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    yield
    reports = terminalreporter.stats
    outcomes = {one.nodeid: kind for kind in ("passed", "skipped", "failed", "error") for one in reports.get(kind, [])}
    rows: list[Row] = config.stash.get(_ROWS, [])
    for line in lines(rows, outcomes):
        terminalreporter.write_line(line)
