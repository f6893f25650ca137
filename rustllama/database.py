"""A SQLite database on a disk that may fail: what can still be read is read, and what is damaged is moved aside.

Many processes may have it open at once; alone, each looks whether it is sound, replaces it and brings it up to date.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import cast

import peewee

from rustllama.errors import DiskFull, InternalError, ReadOnly, RustllamaError, SettingError, Unavailable

_PRAGMAS = {"journal_mode": "wal", "synchronous": "full"}
_BESIDE = ("-wal", "-shm")  # its log and the log's index
_LEAST_FREE_BYTES = 256 * 1024  # they take that much
_DAMAGE = ("malformed", "not a database")
_log = logging.getLogger("rustllama.registry")


class _Snapshot(sqlite3.Connection):
    """Reads a database as it was when it was opened."""


class Database(peewee.SqliteDatabase):
    """Each thread has a connection of its own. `opening` comes first, and all that follows goes through `door`."""

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self.path = path
        super().__init__(str(path), pragmas=_PRAGMAS, timeout=busy_timeout_s)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Inside, the file is there and sound, and no other process is here. Raises SettingError for a bad place."""
        self._make_private()
        with self._alone():
            if not self._is_sound():
                self._move_aside()
                self._make_private()
            yield

    @contextmanager
    def door(self) -> Iterator[None]:
        """Turns SQLite's errors into ours; its words are fixed (sqlite3ErrStr), its codes only in Python 3.11."""
        try:
            yield
        except (peewee.PeeweeException, sqlite3.Error) as error:  # peewee fetches rows without translating
            traceback.clear_frames(error.__traceback__)  # a cursor in them would keep the connection open after `close`
            raise self._translated(str(error)) from error
        finally:
            if not self.is_closed() and self._is_read_only():
                self.close()  # the next call may find a disk that can be written

    def moved_aside(self) -> list[Path]:
        """Damaged databases that nobody has deleted yet, the oldest first."""
        return sorted(self.path.parent.glob(f"{self.path.name}.corrupt-????-??-??-??????"))

    def _connect(self) -> sqlite3.Connection:
        """Before it reads, SQLite makes files beside the database: where that cannot be, it reads without."""
        try:
            return cast(sqlite3.Connection, super()._connect())  # type: ignore[misc]
        except sqlite3.OperationalError:
            if not self._is_complete():
                raise
            return sqlite3.connect(f"{self.path.as_uri()}?immutable=1", uri=True, factory=_Snapshot)

    def _is_read_only(self) -> bool:
        """Whether this thread's connection is: SQLite opens what it cannot write for reading, without a word."""
        connection = self.connection()  # type: ignore[no-untyped-call]
        return isinstance(connection, _Snapshot) or not os.access(self.path, os.W_OK)

    def _is_complete(self) -> bool:
        """Whether nothing is left in the log, as after a graceful end."""
        log = f"{self.path}-wal"
        return os.path.isfile(self.path) and not (os.path.isfile(log) and os.path.getsize(log))

    def _make_private(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            if not os.path.isfile(self.path):  # else it may at least be read
                raise SettingError(
                    f"RUSTLLAMA_HOME={self.path.parent} cannot hold the state: {error.strerror}; "
                    "name a folder that this user can write."
                ) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with ExitStack() as held:
            with suppress(OSError):  # some network's file systems cannot
                folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                held.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield

    def _is_sound(self) -> bool:
        """What is locked or cannot be opened counts as sound: that may end without us."""
        try:
            address = f"{self.path.as_uri()}?mode=ro"  # or closing it would delete the log of a damaged one
            with closing(sqlite3.connect(address, uri=True)) as connection:
                return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
        except sqlite3.DatabaseError as error:
            return not any(words in str(error) for words in _DAMAGE)

    def _move_aside(self) -> None:
        """The database itself comes last: a new one must not find the log of the old one."""
        aside = f"{self.path}.corrupt-{datetime.now():%Y-%m-%d-%H%M%S}"
        try:
            for suffix in (*_BESIDE, ""):
                with suppress(FileNotFoundError):
                    os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        except OSError as error:
            raise SettingError(
                f"{self.path} is damaged and cannot be moved away ({error.strerror}): do that, or set RUSTLLAMA_HOME."
            ) from None
        _log.error("%s was damaged: it is %s now, and a new one begins", self.path, aside)

    def _translated(self, words: str) -> RustllamaError:
        if "locked" in words or "busy" in words:
            return Unavailable(f"{self.path} is locked by another program; try again.")
        if any(damage in words for damage in _DAMAGE):
            return InternalError(
                f"{self.path} is damaged; restart the server, which moves it away and begins a new one."
            )
        not_written = any(reason in words for reason in ("readonly", "unable to open", "disk I/O"))
        if "disk is full" in words or (not_written and self._is_full()):
            return DiskFull(f"The disk that holds {self.path} is full; free some space and try again.")
        if not_written:
            return ReadOnly(f"{self.path} cannot be written; give this user access, or set RUSTLLAMA_HOME.")
        return InternalError(f"{self.path} failed: {words}.")

    def _is_full(self) -> bool:
        """Whether the disk may be written, but has no room for what SQLite writes."""
        try:
            disk = os.statvfs(self.path.parent)
        except OSError:
            return False
        return not disk.f_flag & os.ST_RDONLY and disk.f_bavail * disk.f_frsize < _LEAST_FREE_BYTES
