"""A file on its way: what is on record after which death, and what is not believed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rustllama.pull.partial import Partial, Remote, alone

REMOTE = Remote(250, tag='"a"')


def opened(folder: Path, remote: Remote = REMOTE, boot_id: str = "this") -> Partial:
    return Partial(folder, "key", remote, block_bytes=100, boot_id=boot_id)


def test_every_write_outlives_the_process(tmp_path: Path) -> None:
    part = opened(tmp_path)
    part.write(0, b"x" * 60)
    part.write(2, b"y" * 50)
    again = opened(tmp_path)
    assert (again.resumed_bytes, again.front_bytes) == (110, 60)
    assert [again.missing(block) for block in again.blocks] == [(60, 100), (100, 200), (250, 250)]
    assert again.read(200, 50) == b"y" * 50


def test_after_the_machine_only_what_the_disk_had_for_certain_is_believed(tmp_path: Path) -> None:
    part = opened(tmp_path)
    part.write(0, b"x" * 60)
    part.save()
    part.write(1, b"y" * 10)
    assert opened(tmp_path, boot_id="another").resumed_bytes == 60


def test_without_a_boot_id_only_the_record_is_believed(tmp_path: Path) -> None:
    opened(tmp_path, boot_id="").write(0, b"x" * 60)
    assert opened(tmp_path, boot_id="").resumed_bytes == 0


@pytest.mark.parametrize(
    "other", [Remote(251, tag='"a"'), Remote(250, tag='"b"'), Remote(250, sha256="c", tag='"a"'), Remote(250)]
)
def test_what_is_of_another_file_is_not_taken(tmp_path: Path, other: Remote) -> None:
    opened(tmp_path).write(0, b"x" * 60)
    part = opened(tmp_path, other)
    assert (part.changed, part.resumed_bytes) == (True, 0)


def test_a_file_that_nothing_identifies_is_never_gone_on_with(tmp_path: Path) -> None:
    opened(tmp_path, Remote(250)).write(0, b"x" * 60)
    assert opened(tmp_path, Remote(250)).resumed_bytes == 0


@pytest.mark.parametrize("suffix", ["json", "live", "data"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 24])
def test_a_record_that_does_not_hold_together_is_dropped(tmp_path: Path, suffix: str, damage: bytes) -> None:
    part = opened(tmp_path)
    part.write(0, b"x" * 60)
    part.close()
    (tmp_path / f"key.{suffix}").write_bytes(damage)
    assert opened(tmp_path).resumed_bytes == 0


def test_a_complete_file_gets_its_name_and_leaves_nothing_else(tmp_path: Path) -> None:
    part = opened(tmp_path)
    for block, size in enumerate((100, 100, 50)):
        part.write(block, bytes([block]) * size)
    part.place(tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_bytes() == b"\0" * 100 + b"\1" * 100 + b"\2" * 50


def test_two_who_want_the_same_file_take_turns(tmp_path: Path) -> None:
    order: list[str] = []
    waits = threading.Event()

    def second() -> None:
        with alone(tmp_path, "key", waits.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with alone(tmp_path, "key", lambda: None):
        thread.start()
        assert waits.wait(20)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []
