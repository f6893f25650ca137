"""One pull from its beginning to its end: asks the source, fetches what is not here, checks it and puts it in place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import sleep
from typing import TypeVar

from rustllama.core import Preset
from rustllama.errors import BadRequest, Unreachable
from rustllama.pull import huggingface, image, link
from rustllama.pull.offer import File, Offer
from rustllama.pull.partial import BLOCK_BYTES, Partial, alone
from rustllama.pull.progress import Fetched, Progress, Tell
from rustllama.pull.retries import Pauses, Retries
from rustllama.pull.source import Image, Link, Repository, Source
from rustllama.pull.store import Store, size_of, told
from rustllama.pull.transfer import Changed, Found, Transfer, look
from rustllama.pull.web import Web

_MOST_CHANGES = 3
_SHOWN = 12  # digits of a digest


T = TypeVar("T")


class Pulling:
    """Called once, and blocks. Whatever ends it, the next one goes on where it stopped."""

    def __init__(
        self,
        store: Store,
        web: Web,
        tell: Tell,
        *,
        environ: Mapping[str, str] = os.environ,
        block_bytes: int = BLOCK_BYTES,
        pauses: Pauses = Pauses(),  # noqa: B008 - frozen
    ) -> None:
        """`tell` is called in any thread, and in the calling one while bytes come."""
        self._store = store
        self._web = web
        self._tell = tell
        self._environ = environ
        self._block_bytes = block_bytes
        self._pauses = pauses

    def run(self, source: Source) -> Fetched:
        """Raises RustllamaError."""
        self._store.make()
        self._tell(Progress("pulling manifest"))
        offer = self._patiently(partial(self._ask, source))
        for note in offer.notes:
            self._tell(Progress(note))
        with told(self._store.folder), ExitStack() as held:
            digests = self._fetched(offer.files, held)
        preset = Preset(None, offer.system or None, offer.parameters, offer.license or None, offer.origin)
        return Fetched([str(path) for path in self._store.paths(digests)], preset)

    def _ask(self, source: Source) -> Offer:
        match source:
            case Repository():
                return huggingface.ask(source, self._web, self._environ)
            case Image():
                return image.ask(source, self._web)
            case Link():
                return link.ask(source)

    def _fetched(self, files: Sequence[File], held: ExitStack) -> list[str]:
        """Their digests, when all of them have their places; `held` keeps other processes away until then."""
        digests = [file.sha256 for file in files]
        places = self._store.paths(digests) if all(digests) else []
        if places and self._are_here(files, places):
            return digests
        for key in map(_key, files):
            held.enter_context(alone(self._store.partial, key, self._wait))
        if places and self._are_here(files, places):  # another process fetched them meanwhile
            return digests
        complete = self._complete(files, held)
        self._tell(Progress("writing manifest"))
        digests = [digest for digest, _ in complete]
        for (_, part), place in reversed([*zip(complete, self._store.paths(digests), strict=True)]):
            part.place(place)
        return digests

    def _are_here(self, files: Sequence[File], places: Sequence[Path]) -> bool:
        return all(size_of(place) == file.size_bytes for file, place in zip(files, places, strict=True))

    def _complete(self, files: Sequence[File], held: ExitStack) -> list[tuple[str, Partial]]:
        """Each with its digest."""
        looked = [self._patiently(partial(self._look, file)) for file in files]
        here_bytes = sum(self._store.here_bytes(_key(file)) for file in files)
        self._store.check_space(sum(found.remote.size_bytes for found in looked) - here_bytes)
        return [self._whole(file, found, held) for file, found in zip(files, looked, strict=True)]

    def _look(self, file: File) -> Found:
        found = look(self._web, file.url, file.sha256)
        if file.size_bytes not in (None, found.remote.size_bytes):
            raise BadRequest(
                f"{_shown(file)} has {found.remote.size_bytes} bytes where {file.size_bytes} were promised: pull again "
                "later, or name another source.",
                "model",
            )
        return found

    def _whole(self, file: File, found: Found, held: ExitStack) -> tuple[str, Partial]:
        """Begins anew where what is here turns out to be of another file than what comes."""
        for _ in range(_MOST_CHANGES):
            part = self._opened(file, found)
            held.callback(part.close)
            try:
                digest = self._transfer(file, found, part).run()
            except Changed:
                self._tell(Progress(f"{_shown(file)} has changed meanwhile: starting over"))
                part.discard()
                found = self._patiently(partial(self._look, file))
                continue
            self._tell(Progress("verifying sha256 digest"))
            if file.sha256 in ("", digest):
                return digest, part
            part.discard()
            if not part.resumed_bytes:
                break
            self._tell(Progress(f"what was here of {_shown(file)} is damaged: starting over"))
        raise BadRequest(
            f"What comes from {_shown(file)} is not what was promised or never the same: name another source.", "model"
        )

    def _opened(self, file: File, found: Found) -> Partial:
        block_bytes = self._block_bytes if found.takes_ranges else found.remote.size_bytes
        part = Partial(self._store.partial, _key(file), found.remote, block_bytes=block_bytes)
        if part.changed:
            self._tell(Progress(f"{_shown(file)} has changed since it was begun: starting over"))
        return part

    def _transfer(self, file: File, found: Found, part: Partial) -> Transfer:
        status = f"pulling {file.sha256[:_SHOWN] or _shown(file).rpartition('/')[2]}"
        digest, total = f"sha256:{file.sha256}" if file.sha256 else "", found.remote.size_bytes
        return Transfer(
            self._web,
            file.url,
            part,
            takes_ranges=found.takes_ranges,
            tell=lambda completed: self._tell(Progress(status, digest, total, completed)),
            warn=self._warn,
            pauses=self._pauses,
        )

    def _patiently(self, call: Callable[[], T]) -> T:
        retries = Retries(self._pauses.asking, sleep, self._warn)
        while True:
            try:
                return call()
            except Unreachable as error:
                retries.failed(error)

    def _warn(self, text: str) -> None:
        self._tell(Progress(text))

    def _wait(self) -> None:
        self._tell(Progress("waiting for another process that pulls the same"))


def _key(file: File) -> str:
    """Of its partial file."""
    return file.sha256 or hashlib.sha256(file.url.encode()).hexdigest()


def _shown(file: File) -> str:
    return file.url.partition("?")[0][:200]
