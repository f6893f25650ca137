"""The state folder and its database: whether they can be used, and whether the registered files are as they were.

Nothing is made or changed, so that the registry itself is not opened: it would mend what it finds.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import msgspec

from rustllama import gguf
from rustllama.core import FileIdentity, ModelInfo
from rustllama.doctor.finding import Finding, hint, ok, wrong
from rustllama.errors import BadModelFile
from rustllama.model_files import ModelFiles
from rustllama.pull.store import Store
from rustllama.registry import VERSION
from rustllama.settings import Settings

T = TypeVar("T")
_PATIENCE_S = 1.0  # with all files of models together
_LOW_BYTES = 1 << 30
_GONE_BYTES = 16 << 20
_FORGOTTEN_S = 7 * 86_400.0


def examine(settings: Settings) -> Iterator[Finding]:
    home = settings.home_path
    yield from _disk(home)
    yield from _folder(home)
    if settings.database_path.is_file():
        yield from _database(settings)


def _disk(home: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(_nearest(home)).free
    text = f"{free / 1e9:.1f} GB are free where the state folder is ({home})"
    if free < _GONE_BYTES:
        yield wrong("disk", f"{text}: free some, or nothing can be registered.", free_bytes=free)
    elif free < _LOW_BYTES:
        yield hint("disk", f"{text}: little for models.", free_bytes=free)
    else:
        yield ok("disk", f"{text}.", free_bytes=free)


def _nearest(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.is_dir())


def _folder(home: Path) -> Iterator[Finding]:
    if not home.exists():
        parent = _nearest(home)
        if os.access(parent, os.W_OK | os.X_OK) and not _is_below_a_file(home):
            yield ok("state folder", f"{home} will be made at the first start.")
        else:
            yield wrong("state folder", f"{home} cannot be made in {parent}: set RUSTLLAMA_HOME to a place of yours.")
        return
    status = home.stat()
    if not home.is_dir():
        yield wrong("state folder", f"{home} is no folder: move it away, or set RUSTLLAMA_HOME.")
    elif not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        yield wrong("state folder", f"{home} cannot be written by you: `sudo chown -R $(id -un) {home}`.")
    elif status.st_uid != os.geteuid() == 0:
        yield hint(
            "state folder",
            f"{home} belongs to user {status.st_uid}: run rustllama as that one, or root's files will be in its way.",
        )
    elif status.st_uid != os.geteuid():
        yield wrong(
            "state folder", f"{home} belongs to user {status.st_uid}, not to you: `sudo chown -R $(id -un) {home}`."
        )
    elif status.st_mode & 0o077:
        kind = wrong if status.st_mode & 0o022 else hint
        yield kind("state folder", f"{home} is open to other users of this machine: `chmod 700 {home}`.")
    else:
        yield ok("state folder", f"{home} is yours alone.")


def _is_below_a_file(path: Path) -> bool:
    return any(parent.exists() and not parent.is_dir() for parent in path.parents)


def _database(settings: Settings) -> Iterator[Finding]:
    path = settings.database_path
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0.2)) as connection:
            sound = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if not sound:
                raise sqlite3.DatabaseError("malformed")
            if version > VERSION:
                yield wrong("database", f"{path} is of a newer rustllama: update this one, or set RUSTLLAMA_HOME.")
                return
            rows = connection.execute("SELECT name, path, identity, info FROM model").fetchall()
        _try_to_write(path)
    except sqlite3.Error as error:
        yield _failed(path, str(error))
        return
    yield ok("database", f"{path} is sound.", models=len(rows))
    yield from _models(rows)
    yield from _unused(settings.blobs_path, rows)
    yield from _unfinished(settings.models_path)


def _try_to_write(path: Path) -> None:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0.2)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _failed(path: Path, words: str) -> Finding:
    if "locked" in words or "busy" in words:
        return wrong("database", f"{path} is locked by another program: end that one.")
    if "malformed" in words or "not a database" in words:
        return wrong(
            "database",
            f"{path} is damaged: `rustllama serve` moves it aside and begins anew; create models again.",
        )
    if "no such table" in words:
        return ok("database", f"{path} is empty yet.")
    return wrong("database", f"{path} cannot be used ({words}): give this user access, or set RUSTLLAMA_HOME.")


def _models(rows: list[tuple[str, str, str, str]]) -> Iterator[Finding]:
    changed = _within(_PATIENCE_S, lambda: [found for row in rows if (found := _changed(*row[:3]))])
    if changed is None:
        yield wrong("models", "a file system that holds models does not answer: look at its mounts.")
        return
    yield from changed
    if rows and not changed:
        yield ok("models", f"{len(rows)} registered, and all files are there as they were.")


def _changed(name: str, path: str, identity: str) -> Finding | None:
    try:
        found = gguf.identity(Path(path))
        was = msgspec.json.decode(identity, type=FileIdentity)
    except (BadModelFile, OSError, ValueError) as error:
        return wrong("models", f"'{name}' has lost its file: {error} Or `rustllama rm {name}`.")
    except msgspec.DecodeError:
        return wrong("models", f"what the database says of '{name}' cannot be read: create it again.")
    if found != was:
        return hint("models", f"the file of '{name}' has changed ({path}): it is examined again at the next chat.")
    return None


def _unused(folder: Path, rows: list[tuple[str, str, str, str]]) -> Iterator[Finding]:
    """What clients sent and made no model of."""
    used = {path for row in rows for path in (row[1], *_parts(row[3]))}
    files = ModelFiles(folder)
    unused = [path for path in folder.glob("*") if files.contains(path) and str(path) not in used]
    if unused:
        size = sum(path.stat().st_size for path in unused)
        yield hint("models", f"{len(unused)} files in {folder} ({size / 1e9:.1f} GB) belong to no model: delete them.")


def _unfinished(folder: Path) -> Iterator[Finding]:
    """Pulls that nobody goes on with."""
    store, long_ago_s = Store(folder), time.time() - _FORGOTTEN_S
    files = [path for path in store.partial.glob("*.data") if path.stat().st_mtime < long_ago_s]
    if files:
        size = sum(store.here_bytes(path.stem) for path in files)
        yield hint(
            "models",
            f"{len(files)} pulls that ended early are in {store.partial} for a week ({size / 1e9:.1f} GB): pull again, "
            "or delete them.",
        )


def _parts(info: str) -> tuple[str, ...]:
    try:
        return msgspec.json.decode(info, type=ModelInfo).parts
    except msgspec.DecodeError:
        return ()


def _within(timeout_s: float, look: Callable[[], T]) -> T | None:
    """What `look` returns, or None where a file system lets it wait."""
    seen: list[T] = []
    thread = threading.Thread(target=lambda: seen.append(look()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return seen[0] if seen else None
