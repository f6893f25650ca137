"""The folder of saved states: their names, their limit, and which of them leave for others.

Every method blocks on a disk and raises nothing: what fails is a line in the log. Several processes may share the
folder: a file appears complete, never changes, and may be deleted by anybody at any time.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import msgspec

from rustllama.engine import state_file
from rustllama.engine.states import Saved, Shape, Stored

T = TypeVar("T")
MOST_FILES = 4096  # their tokens are kept in memory
_STATE, _PART = ".state", ".part"
_PART_AGE_S = 3600.0  # after which nobody is still writing it
_log = logging.getLogger("rustllama.engine")


class _File(NamedTuple):
    used_ns: int  # the time of the file: reading it sets it
    name: str
    size_bytes: int


class StateFolder:
    """Files are named digest-build-shape-number, so that most need not be read to see whose they are."""

    def __init__(self, path: Path, limit_bytes: int, build: str) -> None:
        """`build` tells the program that writes states: no other one's are read."""
        self.limit_bytes = limit_bytes
        self._path = path
        self._build = build

    def tidy(self) -> None:
        """Deletes what no server will use: states of other builds, unfinished files, and what is beyond the limit."""
        files = self._files()
        tag = f"-{_short(self._build.encode())}-"
        others = [file.name for file in files if file.name.endswith(_STATE) and tag not in file.name]
        if others:
            _log.info("deleting %d saved states of another build of llama.cpp", len(others))
        long_ago_ns = time.time_ns() - int(_PART_AGE_S * 10**9)
        parts = [file.name for file in files if file.name.endswith(_PART) and file.used_ns < long_ago_ns]
        self.delete(others + parts)
        self._make_room(0)

    def names(self, shape: Shape) -> list[str]:
        """Of what there is for contexts of this shape; the file used last comes first."""
        return [file.name for file in sorted(self._of(shape), reverse=True)]

    def heads(self, shape: Shape, names: list[str]) -> list[Stored]:
        """What can be told of these states without reading them whole."""
        key = self._key(shape)
        heads = [(name, self._read(name, lambda file: state_file.read_head(file, key))) for name in names]
        return [
            Stored(shape, head.tokens, head.held, name, head.size_bytes) for name, head in heads if head is not None
        ]

    def read(self, stored: Stored) -> memoryview | None:
        """The state, or None when it is gone or not what it was."""

        def read(file: BinaryIO) -> memoryview:
            head = state_file.read_head(file, self._key(stored.shape))
            if head.held != stored.held or head.tokens.tobytes() != stored.tokens.tobytes():
                raise state_file.BadStateFile("it has other tokens than before")
            state = state_file.read_state(file, head)
            os.utime(file.fileno())
            return state

        return self._read(stored.name, read)

    def write(self, saved: Saved) -> tuple[Stored | None, list[str]]:
        """What is on disk then, and the names of those that had to leave for it."""
        key = self._key(saved.shape)
        size_bytes = state_file.size_bytes(key, saved.tokens, saved.state)
        if size_bytes > self.limit_bytes:
            return None, []
        name = self._prefix(saved.shape) + uuid.uuid4().hex
        part, path = self._path / (name + _PART), self._path / (name + _STATE)
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            left = self._make_room(size_bytes)
            state_file.write(part, key, saved.tokens, saved.held, saved.state)
            part.rename(path)
        except OSError as error:
            _log.warning("a state could not be saved in %s: %s", self._path, error.strerror)
            self.delete([part.name])
            return None, []
        return Stored(saved.shape, saved.tokens, saved.held, path.name, size_bytes), left

    def forget(self, digest: str) -> None:
        """Deletes all states of a model."""
        prefix = f"{digest[:16]}-"
        self.delete(file.name for file in self._files() if file.name.startswith(prefix))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                (self._path / name).unlink(missing_ok=True)
            except OSError as error:
                _log.warning("%s could not be deleted: %s", self._path / name, error.strerror)

    def sizes(self, shape: Shape) -> dict[str, int]:
        """Bytes of each file of this shape, by name."""
        return {file.name: file.size_bytes for file in self._of(shape)}

    @property
    def used_bytes(self) -> int:
        return sum(file.size_bytes for file in self._files())

    def _read(self, name: str, read: Callable[[BinaryIO], T]) -> T | None:
        """What `read` makes of the file. One that cannot be read or believed is deleted."""
        path = self._path / name
        try:
            with path.open("rb") as file:
                return read(file)
        except FileNotFoundError:
            return None  # another process needed the room
        except (OSError, state_file.BadStateFile) as error:
            _log.warning("the saved state %s is not used and deleted: %s", path, error)
        self.delete([name])
        return None

    def _make_room(self, size_bytes: int) -> list[str]:
        """Deletes the states used longest ago, until so many bytes and a file fit."""
        files, left = self._files(), list[str]()
        used_bytes = sum(file.size_bytes for file in files)
        states = sorted((file for file in files if file.name.endswith(_STATE)), reverse=True)
        while states and (used_bytes + size_bytes > self.limit_bytes or len(states) >= MOST_FILES):
            oldest = states.pop()
            left.append(oldest.name)
            used_bytes -= oldest.size_bytes
        self.delete(left)
        return left

    def _of(self, shape: Shape) -> list[_File]:
        prefix = self._prefix(shape)
        return [file for file in self._files() if file.name.startswith(prefix) and file.name.endswith(_STATE)]

    def _files(self) -> list[_File]:
        """All that are ours."""
        try:
            with os.scandir(self._path) as entries:
                return [file for entry in entries if (file := _file(entry)) is not None]
        except FileNotFoundError:
            return []
        except OSError as error:
            _log.warning("the saved states in %s cannot be listed: %s", self._path, error.strerror)
            return []

    def _prefix(self, shape: Shape) -> str:
        return f"{shape.digest[:16]}-{_short(self._build.encode())}-{_short(self._key(shape))}-"

    def _key(self, shape: Shape) -> bytes:
        return msgspec.json.encode((self._build, *shape))


def _file(entry: os.DirEntry[str]) -> _File | None:
    if not entry.name.endswith((_STATE, _PART)):
        return None
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:  # another process deleted it just now
        return None
    return _File(found.st_mtime_ns, entry.name, found.st_size)


def _short(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"
