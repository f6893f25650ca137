"""A file that is on its way: the bytes that are here already, and a record of them that survives every death.

Three files in one folder, named by a key. `KEY.data` has the bytes. `KEY.json`, replaced as a whole, tells of which
remote file they are and how many of each block are on the disk for certain: it is written after the disk has them.
`KEY.live` holds the same counts as of each write, without waiting for the disk. The kernel keeps both when a process
dies, so the live counts are good until the machine has been started anew, which its boot id tells.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

BLOCK_BYTES = 32 << 20

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_COUNT = struct.Struct("<Q")


class Remote(msgspec.Struct, frozen=True):
    """What tells a remote file from what it was before. Where neither tag nor digest is known, only the size does."""

    size_bytes: int
    sha256: str = ""  # hexadecimal, as promised by the source
    tag: str = ""  # ETag, or Last-Modified


class _Record(msgspec.Struct, frozen=True):
    remote: Remote
    block_bytes: int
    boot_id: str
    counts: list[int]

    def size(self, block: int) -> int:
        """Of the block when it is complete; the last one may be shorter."""
        return min(self.block_bytes, self.remote.size_bytes - block * self.block_bytes)

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether they can be counts of its blocks."""
        blocks = -(-self.remote.size_bytes // max(1, self.block_bytes))
        return len(counts) == blocks and all(0 <= count <= self.size(block) for block, count in enumerate(counts))


class Partial:
    """Written by several threads, each at blocks of its own; opened by one process at a time."""

    def __init__(
        self, folder: Path, key: str, remote: Remote, *, block_bytes: int = BLOCK_BYTES, boot_id: str | None = None
    ) -> None:
        """Goes on with what is there of this remote file, else begins anew: see `resumed_bytes`. Raises OSError."""
        self.remote = remote
        self.path = folder / f"{key}.data"
        self._record_path = folder / f"{key}.json"
        self._live_path = folder / f"{key}.live"
        self._boot_id = _boot_id() if boot_id is None else boot_id
        self._lock = threading.Lock()
        record = self._read()
        self.changed = record is not None and not _same(record.remote, remote)
        if record is None or self.changed:
            self._forget()
            record = _Record(remote, block_bytes, self._boot_id, [0] * -(-remote.size_bytes // block_bytes))
            self._live_path.touch(0o600)
        self._block_bytes = record.block_bytes
        self._counts = self._believed(record)
        self.resumed_bytes = self._done = sum(self._counts)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._data = os.open(self.path, flags, 0o600)
        self._live = os.open(self._live_path, flags, 0o600)
        os.ftruncate(self._data, remote.size_bytes)
        os.pwrite(self._live, b"".join(map(_COUNT.pack, self._counts)), 0)
        self._write_record(self._counts)

    @property
    def blocks(self) -> range:
        return range(len(self._counts))

    @property
    def done_bytes(self) -> int:
        return self._done

    @property
    def front_bytes(self) -> int:
        """How many bytes are here from the beginning on, without a gap."""
        for block, count in enumerate(self._counts):
            if count < self._size(block):
                return block * self._block_bytes + count
        return self.remote.size_bytes

    def missing(self, block: int) -> tuple[int, int]:
        """Where what the block lacks begins and ends in the file; the same where it lacks nothing."""
        start = block * self._block_bytes
        return start + self._counts[block], start + self._size(block)

    def write(self, block: int, data: bytes) -> None:
        """Adds to a block what comes next of it; on record when this returns. Raises OSError."""
        place, end = self.missing(block)
        assert place + len(data) <= end
        rest = memoryview(data)
        while rest:
            rest = rest[os.pwrite(self._data, rest, place + len(data) - len(rest)) :]
        self._counts[block] += len(data)
        os.pwrite(self._live, _COUNT.pack(self._counts[block]), block * _COUNT.size)
        with self._lock:
            self._done += len(data)

    def read(self, place: int, size_bytes: int) -> bytes:
        return os.pread(self._data, size_bytes, place)

    def save(self) -> None:
        """Brings what is here to the disk, and then the record of it. Raises OSError."""
        counts = list(self._counts)  # of what was written before, which is what the disk is made to have
        os.fsync(self._data)
        self._write_record(counts)

    def begin_anew(self) -> None:
        """Nothing that is here is believed any more. No other thread writes."""
        self._counts = [0] * len(self._counts)
        self._done = self.resumed_bytes = 0
        os.pwrite(self._live, bytes(_COUNT.size * len(self._counts)), 0)
        self._write_record(self._counts)

    def place(self, path: Path) -> None:
        """Gives the complete file its name, and leaves nothing behind. Raises OSError."""
        os.fsync(self._data)
        os.replace(self.path, path)
        _sync_folder(path.parent)
        self.close()
        self._forget()

    def discard(self) -> None:
        self.close()
        self._forget()

    def close(self) -> None:
        """What is here stays."""
        for name in ("_data", "_live"):
            if (descriptor := getattr(self, name)) >= 0:
                setattr(self, name, -1)
                os.close(descriptor)

    def _size(self, block: int) -> int:
        return min(self._block_bytes, self.remote.size_bytes - block * self._block_bytes)

    def _believed(self, record: _Record) -> list[int]:
        if not record.boot_id or record.boot_id != self._boot_id:
            return record.counts
        data = self._live_path.read_bytes()
        live = [count for (count,) in _COUNT.iter_unpack(data[: len(data) // _COUNT.size * _COUNT.size])]
        return live if record.fits(live) else record.counts

    def _read(self) -> _Record | None:
        """None where there is nothing, or nothing that holds together."""
        try:
            record = msgspec.json.decode(self._record_path.read_bytes(), type=_Record)
            sound = self.path.stat().st_size == record.remote.size_bytes and record.fits(record.counts)
            return record if sound and self._live_path.exists() else None
        except (OSError, msgspec.MsgspecError):
            return None

    def _write_record(self, counts: list[int]) -> None:
        record = _Record(self.remote, self._block_bytes, self._boot_id, counts)
        made = self._record_path.with_suffix(".new")
        with made.open("wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, self._record_path)
        _sync_folder(made.parent)

    def _forget(self) -> None:
        """The record first: without it the rest is nothing."""
        for path in (self._record_path, self._live_path, self.path):
            path.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Inside, no other process has the partial file of this key. `on_wait` is called where one has it now."""
    path = folder / f"{key}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor, on_wait)
            if _is_still(descriptor, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, on_wait: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait()
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the file at `path` is the one that is locked: who had it before has deleted it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _same(old: Remote, new: Remote) -> bool:
    if old.size_bytes != new.size_bytes or old.sha256 != new.sha256:
        return False
    return bool(new.sha256) or (old.tag == new.tag and bool(new.tag))


def _boot_id() -> str:
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
