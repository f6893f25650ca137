"""The registry on a disk that fails: damaged, locked, full, read-only. Real SQLite, real mounts."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rustllama.database import Database
from rustllama.errors import DiskFull, InternalError, ReadOnly, SettingError, Unavailable
from rustllama.registry import Registry
from tests.disks import Disk
from tests.test_registry import NOWHERE, names, record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database that was closed; it has `a`."""
    return registered(tmp_path / "rustllama.db")


def registered(path: Path) -> Path:
    with closing(reopened(path)) as registry:
        registry.put(record("a"))
    return path


def reopened(path: Path) -> Registry:
    return Registry(path, bundled=NOWHERE, busy_timeout_s=0.01)


def moved_aside(path: Path) -> list[Path]:
    return Database(path, 0).moved_aside()


def spoil(path: Path, place: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 4096)


@pytest.mark.parametrize("place", [0, 4096])
def test_a_damaged_database_is_moved_aside_and_a_new_one_begins(
    path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(path, place)
    spoilt = path.read_bytes()
    with closing(reopened(path)) as registry:
        assert names(registry) == []
        registry.put(record("b"))
        (aside,) = moved_aside(path)
        assert aside.read_bytes() == spoilt
        assert str(aside) in caplog.text
        (warning,) = registry.list().warnings
        assert f"damaged and is {aside} now" in warning
    with closing(reopened(path)) as registry:
        assert (names(registry), len(registry.list().warnings)) == (["b"], 1)
        aside.unlink()
        assert registry.list().warnings == ()


def test_the_log_of_a_damaged_database_moves_with_it(path: Path) -> None:
    spoil(path)
    path.with_name(path.name + "-wal").write_bytes(b"old")
    with closing(reopened(path)):
        (aside,) = moved_aside(path)
        assert aside.with_name(aside.name + "-wal").read_bytes() == b"old"


def test_a_database_that_is_whole_stays(path: Path) -> None:
    with closing(reopened(path)) as registry:
        assert (names(registry), registry.list().warnings) == (["a"], ())


STARTER = """
import sys
import time
from pathlib import Path
from rustllama.database import Database
from rustllama.registry import Registry
from tests.test_registry import NOWHERE, record
move_aside = Database._move_aside
Database._move_aside = lambda database: (time.sleep(0.5), move_aside(database))
sys.stdin.readline()
Registry(Path(sys.argv[1]), bundled=NOWHERE).put(record(sys.argv[2]))
"""


def test_of_many_that_start_at_once_one_moves_it(path: Path) -> None:
    spoil(path)
    starts = [
        subprocess.Popen([sys.executable, "-c", STARTER, path, name], stdin=subprocess.PIPE, text=True)
        for name in "bcdef"
    ]
    for process in starts:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
    assert [process.wait() for process in starts] == [0] * 5
    assert len(moved_aside(path)) == 1
    with closing(reopened(path)) as registry:
        assert set(names(registry)) == set("bcdef")


def test_damage_that_is_met_while_running_is_told_and_healed_by_the_next_start(path: Path) -> None:
    with closing(reopened(path)) as registry:
        spoil(path)
        with pytest.raises(InternalError, match="is damaged; restart the server"):
            registry.list()
    with closing(reopened(path)) as registry:
        registry.put(record("b"))


@pytest.fixture
def locked(path: Path) -> Iterator[Path]:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield path


def test_a_locked_database_is_opened_and_read(locked: Path) -> None:
    with closing(reopened(locked)) as registry:
        assert registry.get("a").name == "a"
        with pytest.raises(Unavailable, match="locked by another program"):
            registry.delete("a")


def test_a_read_only_place_is_read_and_written_again_when_it_can_be(disk: Disk) -> None:
    path = registered(disk.path / "rustllama.db")
    disk.remount("ro")
    with closing(reopened(path)) as registry:
        assert registry.get("a").name == "a"
        with pytest.raises(ReadOnly, match=rf"{path} cannot be written"):
            registry.put(record("b"))
        disk.remount("rw")
        registry.put(record("b"))
        assert names(registry) == ["b", "a"]


def test_what_a_killed_server_left_in_a_place_that_is_now_read_only_is_read_too(disk: Disk) -> None:
    path = disk.path / "rustllama.db"
    writer = "from tests.test_database import *; import os, sys; registered(Path(sys.argv[1])); "
    writer += "reopened(Path(sys.argv[1])).put(record('b')); os._exit(0)"
    subprocess.run([sys.executable, "-c", writer, path], check=True)
    disk.remount("ro")
    with closing(reopened(path)) as registry:
        assert names(registry) == ["b", "a"]
        disk.remount("rw")
        registry.put(record("c"))


def test_a_read_only_place_without_a_database_is_named(disk: Disk) -> None:
    disk.remount("ro")
    with pytest.raises(SettingError, match=rf"RUSTLLAMA_HOME={disk.path} cannot hold the state: Read-only"):
        reopened(disk.path / "rustllama.db")


def test_a_damaged_database_in_a_read_only_place_is_named(disk: Disk) -> None:
    spoil(path := registered(disk.path / "rustllama.db"))
    disk.remount("ro")
    with pytest.raises((SettingError, InternalError), match=f"{path} is damaged"):
        reopened(path)


@pytest.mark.parametrize("warm", [True, False])
def test_a_full_disk_is_read_and_written_again_when_it_has_room(disk: Disk, warm: bool) -> None:
    """Cold, SQLite has not even room for what it puts beside a database before it reads."""
    path = registered(disk.path / "rustllama.db")
    if not warm:
        disk.fill()
    with closing(reopened(path)) as registry:
        assert names(registry) == ["a"]
        if warm:
            disk.fill()
        with pytest.raises(DiskFull, match=rf"The disk that holds {path} is full"):
            registry.put(record("b"))
        assert names(registry) == ["a"]
        disk.clear()
        registry.put(record("b"))
        assert names(registry) == ["b", "a"]
