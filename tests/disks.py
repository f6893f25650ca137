"""Real disks for tests: one that fills up or turns read-only, one that never answers. Who runs them may mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Disk:
    """One megabyte of memory."""

    path: Path

    def fill(self) -> None:
        with suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 512):
                pass

    def clear(self) -> None:
        (self.path / "filler").unlink()

    def remount(self, mode: str) -> None:
        """`mode` is "ro" or "rw"."""
        _mount("-o", f"remount,{mode}", str(self.path))


@contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
    path.mkdir()
    _mount("-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(path))
    try:
        yield Disk(path)
    finally:
        _unmount(path)


@contextmanager
def hanging(folder: Path) -> Iterator[None]:
    """Inside, the file system at `folder` is one whose server says nothing; what was there comes back."""
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"needs /dev/fuse: {error.strerror}")
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0"
    try:
        _mount("-i", "-t", "fuse", "-o", options, "hanging", str(folder), descriptors=(server,))
        try:
            yield
        finally:
            _unmount(folder)
    finally:
        os.close(server)  # who waits gets an error


def _mount(*arguments: str, descriptors: tuple[int, ...] = ()) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False, pass_fds=descriptors)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


def _unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], check=True)
