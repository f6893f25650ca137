"""The files of models that the server keeps itself, in a folder of its own, each named by the SHA-256 of what is in it.

What a user registers stays where it is and is never touched; a file in here goes when no name uses it any more. Every
function blocks on a disk: call it in a worker thread. Several processes may share the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rustllama.errors import BadModelFile, BadRequest, DiskFull, InternalError

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_FILE = re.compile(r"sha256-[0-9a-f]{64}(-\d{5}-of-\d{5}\.gguf)?")  # a part of a split model: of all parts' digests
_UNFINISHED = ".upload"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger("rustllama.models")


class ModelFiles:
    """Of one folder, which is made when the first file comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, digest: str) -> Path:
        """Where the file with this digest is, or would be; it is like "sha256:" and 64 digits. Raises BadRequest."""
        found = _DIGEST.fullmatch(digest.lower())
        if not found:
            raise BadRequest(
                f"{digest[:80]!r} is not a digest: it has to be 'sha256:' and 64 hexadecimal digits.", "digest"
            )
        return self.folder / f"sha256-{found[1]}"

    def contains(self, path: Path) -> bool:
        """Whether this file is the server's own, there or not."""
        return path.parent == self.folder and _FILE.fullmatch(path.name) is not None

    def receive(self, digest: str, size_bytes: int | None) -> Incoming:
        """A file that is to come, in pieces. Raises BadRequest, DiskFull or InternalError.

        `size_bytes` None: nobody knows.
        """
        path = self.path_of(digest)
        with _translated(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if size_bytes is not None and size_bytes > free:
                raise DiskFull(
                    f"The file has {size_bytes} bytes, and the disk of {self.folder} has {free} free: free "
                    f"{size_bytes - free} more and try again."
                )
            with self._alone():
                self._sweep()
                return Incoming(path, self._alone)

    @contextmanager
    def kept(self, paths: Iterable[str]) -> Iterator[None]:
        """Inside, nobody removes those of these files that are ours. Raises BadModelFile for one that is gone."""
        ours = self._ours(paths)
        with self._alone() if ours else contextlib.nullcontext():
            for path in ours:
                if not path.exists():
                    raise BadModelFile(f"{path} was deleted meanwhile: send the file again.")
            yield

    def remove_unused(self, paths: Iterable[str], used: Callable[[], Collection[str]]) -> None:
        """Deletes those of these files that are ours, and that are not among the paths that names use."""
        ours = self._ours(paths)
        if not ours:
            return
        with self._alone():
            in_use = used()
            for path in ours:
                if str(path) not in in_use:
                    _remove(path)

    def _ours(self, paths: Iterable[str]) -> list[Path]:
        return [path for path in map(Path, paths) if self.contains(path)]

    def _sweep(self) -> None:
        """What a process left that died: the lock of its file died with it."""
        for path in self.folder.glob(f"*{_UNFINISHED}"):
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread or process is here."""
        with contextlib.ExitStack() as held:
            with suppress(OSError):  # some network's file systems cannot
                folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                held.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield


class Incoming:
    """A file while it comes: nobody sees it before `keep`, and without that `close` leaves nothing behind."""

    def __init__(self, path: Path, alone: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._path = path
        self._alone = alone
        self._sum = hashlib.sha256()
        self._unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_UNFINISHED}")
        self._file = os.open(self._unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def write(self, piece: bytes) -> None:
        """Raises DiskFull or InternalError."""
        self._sum.update(piece)
        left = memoryview(piece)
        with _translated(self._path.parent):
            while left:
                left = left[os.write(self._file, left) :]

    def keep(self) -> None:
        """It is whole, and outlives the machine's death from now on. Raises BadRequest where it is another file."""
        came = f"sha256-{self._sum.hexdigest()}"
        if came != self._path.name:
            raise BadRequest(
                f"The body has the digest {came.replace('-', ':')}, not {self._path.name.replace('-', ':')}: "
                "send the file again.",
                "digest",
            )
        with _translated(self._path.parent):
            os.fsync(self._file)
            with self._alone():
                if not self._path.exists():  # or one that is in use would become another
                    os.rename(self._unfinished, self._path)
            _sync_folder(self._path.parent)

    def close(self) -> None:
        with suppress(OSError):
            self._unfinished.unlink()  # the name is gone where it was kept
        os.close(self._file)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s is used by no model and could not be deleted: %s", path, error.strerror)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    """Errors of a disk as ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(f"The disk of {folder} is full: free some space and send the file again.") from None
        raise InternalError(f"{folder} cannot keep a model's file: {error.strerror}; give this user access.") from error
