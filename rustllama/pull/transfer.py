"""One file on its way from another server: several connections fetch blocks, and a hash follows behind them.

What fails for a passing reason is tried again where it stopped. Blocks are taken from the front, so that the hash,
which has to read the file in order, is never far behind.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import requests
import urllib3

from rustllama.errors import BadRequest, RustllamaError, Unreachable
from rustllama.pull.partial import Partial, Remote
from rustllama.pull.retries import Pauses, Retries
from rustllama.pull.web import Web, unreachable

CONNECTIONS = 4

_READ_BYTES = 1 << 18  # at most, at once: in the kernel, no thread of an answer takes its core back
_HASH_BYTES = 1 << 20
_LOOK_S = 0.02  # of the hash for more
_TELL_S = 0.1
_SAVE_S = 5.0  # lost at most where the power fails
_LARGEST_BYTES = 1 << 50
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


class Changed(Exception):
    """What is at the source is not what it was."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a server says of a file."""

    remote: Remote
    takes_ranges: bool


def look(web: Web, url: str, sha256: str) -> Found:
    """Asks for the first byte. Raises what Web.open does, and BadRequest where no size is told."""
    with web.open(url, {"Range": "bytes=0-0"}) as response:
        return _found(response, sha256)


class Transfer:
    """Fetches what `partial` lacks. `tell` is called in the calling thread, some times a second; `warn` in any."""

    def __init__(
        self,
        web: Web,
        url: str,
        partial: Partial,
        *,
        takes_ranges: bool,
        tell: Callable[[int], None],
        warn: Callable[[str], None],
        pauses: Pauses,
    ) -> None:
        self._web = web
        self._url = url
        self._partial = partial
        self._takes_ranges = takes_ranges
        self._tell = tell
        self._warn = warn
        self._pauses = pauses
        self._blocks: Iterator[int] = iter(partial.blocks)
        self._taking = threading.Lock()
        self._stopping = threading.Event()
        self._failure: Exception | None = None

    def run(self) -> str:
        """The SHA-256 of the whole file, in hexadecimal. Raises Changed, RustllamaError or OSError; all here stays."""
        count = CONNECTIONS if self._takes_ranges else 1
        threads = [threading.Thread(target=self._fetch, name=f"fetch-{number}") for number in range(count)]
        with ExitStack() as ending:
            for thread in threads:
                thread.start()
                ending.callback(thread.join)
            ending.callback(self._stopping.set)
            return self._follow()

    def _follow(self) -> str:
        """Hashes what is here, until all of it is."""
        digest, place, told_s, saved_s = hashlib.sha256(), 0, -1.0, time.monotonic()
        while place < self._partial.remote.size_bytes:
            now_s = time.monotonic()
            if now_s - told_s >= _TELL_S:
                self._tell(self._partial.done_bytes)
                told_s = now_s
            if now_s - saved_s >= _SAVE_S:
                self._partial.save()
                saved_s = time.monotonic()
            ready = min(self._partial.front_bytes - place, _HASH_BYTES)
            if ready:
                digest.update(self._partial.read(place, ready))
                place += ready
                self._rest()
            elif self._failure is not None:
                raise self._failure
            else:
                self._stopping.wait(_LOOK_S)
        self._tell(place)
        return digest.hexdigest()

    def _fetch(self) -> None:
        """In a thread of its own: block after block."""
        try:
            while not self._stopping.is_set():
                with self._taking:
                    block = next(self._blocks, None)
                if block is None:
                    return
                self._fetch_block(block)
        except (RustllamaError, Changed, OSError) as error:
            if self._failure is None:
                self._failure = error
            self._stopping.set()

    def _fetch_block(self, block: int) -> None:
        retries = Retries(self._pauses.fetching, self._stopping.wait, self._warn)
        while not self._stopping.is_set():
            start, end = self._partial.missing(block)
            if start == end:
                return
            try:
                self._fetch_range(block, start, end)
            except Unreachable as error:
                if self._partial.missing(block)[0] > start:
                    retries.succeeded()
                retries.failed(error)

    def _fetch_range(self, block: int, start: int, end: int) -> None:
        with self._web.open(self._url, self._asking(start, end)) as response:
            skipped = start if self._check(response, start, end) else 0
            try:
                while start < end and not self._stopping.is_set():
                    data = response.raw.read1(_READ_BYTES)
                    if not data:
                        raise requests.ConnectionError("it ended early")
                    data, skipped = data[skipped:], max(0, skipped - len(data))
                    data = data[: end - start]
                    self._partial.write(block, data)
                    start += len(data)
                    self._rest()
            except (urllib3.exceptions.HTTPError, requests.RequestException) as error:
                raise unreachable(self._url, error) from None

    def _rest(self) -> None:
        if rest_s := self._pauses.rest_s():
            self._stopping.wait(rest_s)

    def _asking(self, start: int, end: int) -> dict[str, str]:
        if not self._takes_ranges:
            return {}
        tag = self._partial.remote.tag
        condition = {"If-Range": tag} if tag and not tag.startswith("W/") else {}
        return {"Range": f"bytes={start}-{end - 1}", **condition}

    def _check(self, response: requests.Response, start: int, end: int) -> bool:
        """Whether it has the whole file, and not the range. Raises Changed where it is of another file."""
        if response.status_code == 206:
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != start or int(match[2]) >= end:
                raise BadRequest(f"The server of {_shown(self._url)} answers with another range than it was asked for.")
        if _found(response, self._partial.remote.sha256).remote != self._partial.remote:
            raise Changed
        return response.status_code == 200


def _found(response: requests.Response, sha256: str) -> Found:
    headers = response.headers
    match = _RANGE.fullmatch(headers.get("Content-Range", ""))
    length = match[3] if match else headers.get("Content-Length", "")
    if headers.get("Content-Encoding", "identity") != "identity" or not re.fullmatch(r"\d{1,18}", length):
        raise BadRequest(f"The server of {_shown(response.url)} does not say how large the file is.", "model")
    if not 0 < int(length) <= _LARGEST_BYTES:
        raise BadRequest(f"The file at {_shown(response.url)} has {length} bytes: that is no model.", "model")
    tag = "" if sha256 else headers.get("ETag", "") or headers.get("Last-Modified", "")  # a digest says more
    return Found(Remote(int(length), sha256, tag), response.status_code == 206)


def _shown(url: str) -> str:
    return url.partition("?")[0][:200]
