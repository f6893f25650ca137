"""HTTP/1.1 as bytes: a request that is sent, and the recorded bytes of an answer read into a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from rustllama.bench.dialects import Dialect, Event, error_text
from rustllama.bench.player import Recording
from rustllama.bench.trace import Trace


def http_request(host: str, path: str, body: Mapping[str, object], api_key: str = "") -> bytes:
    """The bytes of a POST whose answer ends with the connection."""
    content = msgspec.json.encode(body)
    authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"{authorization}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def read(recording: Recording, dialect: Dialect) -> Trace:
    """What a recording says. A bad status, an error line and an answer without an end are its `error`."""
    arrivals: list[tuple[float, int]] = []
    events: list[Event] = []
    error = recording.failure
    try:
        for when, lines in _lines(recording):
            told = [dialect.event(line) for line in lines]
            events += told
            if count := sum(event.has_text for event in told):
                arrivals.append((when, count))
    except _BadStatus as refused:
        error = str(refused)
    except (msgspec.DecodeError, ValueError, IndexError) as strange:
        error = f"an unreadable answer came: {strange}"
    error = error or next((event.error for event in events if event.error), None)
    if not error and not recording.left and not any(event.done for event in events):
        error = "the answer broke off before its last line"
    return Trace(
        recording.started_s,
        tuple(arrivals),
        prompt_tokens=max((event.prompt_tokens for event in events if event.prompt_tokens is not None), default=None),
        answer_tokens=max((event.answer_tokens for event in events if event.answer_tokens is not None), default=None),
        server_ms=next((event.server_ms for event in reversed(events) if event.server_ms), {}),
        left=recording.left,
        error=error,
    )


class _BadStatus(Exception):
    """The answer's status is not 200; the text says which, and why."""


def _lines(recording: Recording) -> Iterator[tuple[float, list[bytes]]]:
    """The body's complete lines with the time when they were whole."""
    head, status, chunked = b"", 0, False
    raw, body = bytearray(), bytearray()
    for when, piece in recording.pieces:
        raw += piece
        if not head:
            if b"\r\n\r\n" not in raw:
                continue
            head, _, rest = bytes(raw).partition(b"\r\n\r\n")
            raw = bytearray(rest)
            status = int(head.split(None, 2)[1])
            chunked = b"transfer-encoding: chunked" in head.lower()
        body += _unchunked(raw) if chunked else _all(raw)
        if status != 200:
            continue
        *lines, remainder = body.split(b"\n")
        body = remainder
        yield when, [bytes(line) for line in lines if line.strip()]
    if head and status != 200:
        raise _BadStatus(f"HTTP {status}: {error_text(bytes(body))}")


def _all(raw: bytearray) -> bytes:
    taken = bytes(raw)
    raw.clear()
    return taken


def _unchunked(raw: bytearray) -> bytes:
    """Takes the complete chunks out of `raw`."""
    taken = bytearray()
    while (end := raw.find(b"\r\n")) >= 0:
        start, size = end + 2, int(raw[:end].partition(b";")[0], 16)
        if len(raw) < start + size + 2:
            break
        taken += raw[start : start + size]
        del raw[: start + size + 2]
    return bytes(taken)
