"""What is wrong in a body, or in the head that says where it comes from, is refused: with a 4xx, in JSON."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests

from tests.conftest import Server
from tests.hazards import times
from tests.hazards.bodies import PATIENCE_S, WELL, Line, Sent, malformed
from tests.hazards.conftest import Start
from tests.hazards.table import Row
from tests.test_api_web import APP, CELLS, EXTENSION, REFUSALS

MALFORMED = times(10_000, 300)
WARM_UP = times(1_000, 20)  # requests, until the worker has all the memory that it keeps
MOST_MIB = 20


def endpoints(server: Server) -> list[tuple[str, str]]:
    """The method and path of all that take a body."""
    paths = requests.get(f"{server.url}/openapi.json", timeout=PATIENCE_S).json()["paths"]
    return [
        (method.upper(), path)
        for path, methods in paths.items()
        for method, operation in methods.items()
        if "requestBody" in operation
    ]


def rss_mib(server: Server) -> float:
    status = Path(f"/proc/{server.worker_pid}/status").read_text()
    return int(status.partition("\nVmRSS:")[2].split()[0]) / 1024


def wrong_answers(server: Server, seeds: Iterator[int] | range) -> list[object]:
    """The seeds of the bodies that did not get a 4xx in JSON, with what they got; each goes to the next endpoint."""
    targets = endpoints(server)
    wrong: list[object] = []
    with closing(Line(server.url)) as line:
        for seed in seeds:
            method, path = targets[seed % len(targets)]
            sent = malformed(seed)
            answer = line.ask(sent.request(method, path), is_last=sent.is_last)
            if not answer.is_refusal:
                wrong.append((seed, method, path, answer))
    return wrong


def test_malformed_bodies(start: Start, row: Row) -> None:
    server = start()
    worker = server.worker_pid
    assert wrong_answers(server, range(MALFORMED, MALFORMED + WARM_UP)) == []
    before_mib = rss_mib(server)
    wrong = wrong_answers(server, range(MALFORMED))
    assert wrong == []
    row.is_at_most(f"no 4xx JSON of {MALFORMED}", len(wrong), 0)
    row.is_within("RSS", rss_mib(server) - before_mib, MOST_MIB, " MiB more")
    assert server.worker_pid == worker


def test_malformed_bodies_are_of_many_kinds() -> None:
    """Else the row above shows nothing."""
    sent = [malformed(seed) for seed in range(2_000)]
    assert len({one.data for one in sent}) > 1_000
    kinds = Counter(header for one in sent for header in one.headers)
    assert min(kinds[name] for name in ("Content-Type", "Content-Encoding", "Transfer-Encoding")) > 200
    assert sum("Content-Type" not in one.headers for one in sent) > 200


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/chat/completions", "/api/show"])
def test_the_body_that_is_changed_is_well_understood(server: Server, path: str) -> None:
    assert requests.post(server.url + path, json=WELL, timeout=PATIENCE_S).status_code == 404


@pytest.fixture
def guarded(start: Start) -> Server:
    """As the matrix has it."""
    return start(HOSTS="chat.example.com", ORIGINS=f"{APP},{EXTENSION}")


def test_Host_and_Origin_and_Sec_Fetch_Site(guarded: Server, row: Row) -> None:
    wrong = []
    with closing(Line(guarded.url)) as line:
        for host, origin, site, verdict in CELLS:
            given = {"Host": host, "Origin": origin, "Sec-Fetch-Site": site}
            headers = {name: value.strip('"') for name, value in given.items() if value != "-"}
            answer = line.ask(Sent(headers, b"").request("GET", "/api/version"))
            named = REFUSALS[verdict][0].encode() if verdict != "ok" else b"version"
            if answer.status != (200 if verdict == "ok" else 403) or named not in answer.data:
                wrong.append((host, origin, site, verdict, answer))
    assert wrong == []
    row.is_at_least("rows", len(CELLS), 200)
    row.is_at_most("not as in the table", len(wrong), 0)


def test_plain_curl(guarded: Server, row: Row) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("there is no curl")
    body = '{"model": "demo", "prompt": "hello", "options": {"num_predict": 3}}'
    for arguments in ([f"{guarded.url}/api/tags"], [f"{guarded.url}/api/generate", "-d", body]):
        command = [curl, "-s", "-o", "/dev/null", "-w", "%{http_code}", "--noproxy", "*", *arguments]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "200"
    row.is_at_most("refused", 0, 0)
