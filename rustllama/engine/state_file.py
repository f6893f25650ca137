"""A saved state as a file: a head that tells the tokens without the state, then the state; both with checksums.

The head is `_HEAD`, the key (what shapes the state, besides its tokens) and the tokens, all little-endian. Checksums
are CRC-32, of which zlib does gigabytes a second without the interpreter's lock. Every function blocks on a disk.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rustllama.engine.states import Tokens

FORMAT = b"rlstate1"
_HEAD = struct.Struct("<8sIIIQI")  # format; bytes of the key; tokens; held ones; bytes and checksum of the state
_CHECKSUM = struct.Struct("<I")  # of the head
_TOKEN = np.dtype("<i4")


class BadStateFile(Exception):
    """The file is not what was written for this key; its text says why."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a file holds. `begin` is where the state begins, in bytes."""

    tokens: Tokens
    held: int
    begin: int
    state_bytes: int
    state_checksum: int

    @property
    def size_bytes(self) -> int:
        return self.begin + self.state_bytes


def write(path: Path, key: bytes, tokens: Tokens, held: int, state: memoryview) -> int:
    """Makes the file, which nobody else can read, and returns its size when the disk has it. Raises OSError."""
    head = _HEAD.pack(FORMAT, len(key), len(tokens), held, len(state), zlib.crc32(state))
    head += key + tokens.astype(_TOKEN).tobytes()
    head += _CHECKSUM.pack(zlib.crc32(head))
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(head)
        file.write(state)
        file.flush()
        os.fsync(file.fileno())
    return len(head) + len(state)


def size_bytes(key: bytes, tokens: Tokens, state: memoryview) -> int:
    """Of the file that `write` would make."""
    return _head_bytes(len(key), len(tokens)) + len(state)


def read_head(file: BinaryIO, key: bytes) -> Head:
    """Raises BadStateFile and OSError. Sizes are believed when the file has them, and when the checksum agrees."""
    start = file.read(_HEAD.size)
    if len(start) < _HEAD.size or not start.startswith(FORMAT):
        raise BadStateFile("it is no state of this format")
    _, key_bytes, count, held, state_bytes, state_checksum = _HEAD.unpack(start)
    begin = _head_bytes(key_bytes, count)
    if os.fstat(file.fileno()).st_size != begin + state_bytes or not 0 < held <= count:
        raise BadStateFile("it is not as long as it should be")
    rest = file.read(begin - _HEAD.size)
    if (
        len(start) + len(rest) < begin
        or zlib.crc32(start + rest[: -_CHECKSUM.size]) != _CHECKSUM.unpack(rest[-_CHECKSUM.size :])[0]
    ):
        raise BadStateFile("its head is damaged")
    if rest[:key_bytes] != key:
        raise BadStateFile("it belongs to another model or layout")
    tokens = np.frombuffer(rest, _TOKEN, count, key_bytes).astype(np.int32)
    return Head(tokens, held, begin, state_bytes, state_checksum)


def read_state(file: BinaryIO, head: Head) -> memoryview:
    """The state of the file whose head was just read. Raises BadStateFile and OSError."""
    state = np.empty(head.state_bytes, np.uint8)
    if file.readinto(state.data) != head.state_bytes or zlib.crc32(state.data) != head.state_checksum:  # type: ignore[attr-defined]
        raise BadStateFile("its state is damaged")
    return state.data


def _head_bytes(key_bytes: int, tokens: int) -> int:
    return _HEAD.size + key_bytes + tokens * _TOKEN.itemsize + _CHECKSUM.size
