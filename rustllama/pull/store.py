"""Where fetched files are: in `blobs` the complete ones, named as `model_files` wants them, in `partial` the others."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rustllama.errors import DiskFull, InternalError

_SPARE_BYTES = 64 << 20  # that stay free for the database and the log


class Store:
    def __init__(self, folder: Path) -> None:
        """`folder` is that of RUSTLLAMA_MODELS."""
        self.folder = folder
        self.blobs = folder / "blobs"
        self.partial = folder / "partial"

    def make(self) -> None:
        """Raises DiskFull or InternalError."""
        with told(self.folder):
            for folder in (self.blobs, self.partial):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def paths(self, digests: Sequence[str]) -> list[Path]:
        """Where the parts of a model with these digests belong, in the names that llama.cpp wants of them."""
        stem, count = f"sha256-{set_digest(digests)}", len(digests)
        if count == 1:
            return [self.blobs / stem]
        return [self.blobs / f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]

    def check_space(self, missing_bytes: int) -> None:
        """Raises DiskFull, which tells how much there is and how much it takes."""
        with told(self.folder):
            free_bytes = max(0, shutil.disk_usage(self.folder).free - _SPARE_BYTES)
        if missing_bytes > free_bytes:
            raise DiskFull(
                f"{self.folder} has {_size(free_bytes)} free and {_size(missing_bytes)} are still to come: free "
                f"{_size(missing_bytes - free_bytes)}, or set RUSTLLAMA_MODELS to a folder on a larger disk."
            )

    def here_bytes(self, key: str) -> int:
        """What the partial file of this key takes of the disk already; it is as long as it will be, with holes."""
        with suppress(OSError):
            return (self.partial / f"{key}.data").stat().st_blocks * 512
        return 0


def set_digest(digests: Sequence[str]) -> str:
    """Of one file its digest; of several the digest of theirs."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """What the file system refuses, in a sentence. Raises DiskFull or InternalError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"The disk of {folder} is full: free some space and pull again, which goes on where it stopped; or set "
                "RUSTLLAMA_MODELS to a folder on a larger one."
            ) from None
        raise InternalError(
            f"{folder} cannot be used ({os.strerror(error.errno or 0)}): give this user access or set RUSTLLAMA_MODELS."
        ) from error


def size_of(path: Path) -> int | None:
    """In bytes; None where there is no such file."""
    with suppress(OSError):
        return path.stat().st_size
    return None


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
