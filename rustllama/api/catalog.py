"""The models that requests name: created, listed, deleted, and examined again when their file has changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from rustllama import gguf
from rustllama.api.keys import check_model, may_use, may_use_all
from rustllama.bridge import Bulkhead, RLock, offload
from rustllama.core import FileIdentity, ModelRecord, Preset
from rustllama.engine.manager import EngineManager
from rustllama.errors import BadModelFile, InternalError, ModelNotFound, Unavailable
from rustllama.model_files import ModelFiles
from rustllama.probe import prove
from rustllama.pull.progress import Fetched
from rustllama.registry import Listing, Registry, examine
from rustllama.settings import Settings
from rustllama.verdicts import Verdicts

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE_S = 10.0  # with a file system, as a disk that sleeps takes some seconds to wake, and with other writers


class Catalog:
    """Called from the hub's greenlets; files and the database are touched in worker threads."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        manager: EngineManager,
        files: ModelFiles,
        *,
        identity: Callable[[Path], FileIdentity] = gguf.identity,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._registry = registry
        self._verdicts = Verdicts(registry)
        self._manager = manager
        self._own_files = files
        self._identity = identity
        self._patience_s = patience_s
        self._probe_timeout_s = settings.probe_timeout
        self._files = Bulkhead()
        self._examining = RLock()
        self._proving = RLock()  # one at a time: each takes the memory of its model, and one of few threads
        self._writing = RLock()  # likewise: where the database is locked, each waits in its thread

    def list(self) -> Listing:
        """The models that the request's key may use; what the registry lost is told to who may use all."""
        found = offload(self._registry.list)
        if may_use_all():
            return found
        return Listing(tuple(record for record in found.models if may_use(record.name)), ())

    def get(self, name: str) -> ModelRecord:
        """Raises ModelNotFound, and Forbidden where the request's key is for other models: so do all that follow."""
        with _discreetly(name):
            return offload(self._registry.get, name)

    def examine(self, name: str, path: str, preset: Preset = Preset()) -> ModelRecord:  # noqa: B008 - frozen
        """What would be registered. Raises BadRequest for the name, BadModelFile, or Unavailable."""
        check_model(name)
        return replace(self._examined(name, Path(os.path.abspath(os.path.expanduser(path)))), preset=preset)

    def create(self, record: ModelRecord) -> None:
        """Proves the file, then registers it; answers of a model replaced by it end well.

        Raises BadModelFile, OutOfMemory, DiskFull, ReadOnly, Unavailable or InternalError.
        """
        self._prove_alone(record)
        replaced = self._known(record.name)
        self._write(self._put, record)
        if replaced is not None:
            self._let_go(replaced)

    def adopt(self, name: str, fetched: Fetched) -> None:
        """As `create`, of files of the server's own; those of a model that proves to be bad are deleted."""
        try:
            self.create(self.examine(name, str(fetched.paths[0]), fetched.preset))
        except BadModelFile:
            offload(self._own_files.remove_unused, fetched.paths, self._registry.paths)
            raise

    def delete(self, name: str) -> None:
        """Raises ModelNotFound. The file stays, unless it is the server's own and no other name uses it."""
        record = self._known(name)
        with _discreetly(name):
            self._write(self._registry.delete, name)
        if record is not None:
            self._let_go(record)

    def current(self, name: str) -> ModelRecord:
        """The record to load: as `get`, but proved again when the file is not the one that was examined.

        A model whose file is gone or changed is unloaded: llama.cpp dies of a page that a mapped file has no more.
        Raises ModelNotFound, BadModelFile where the file is gone or spoilt, or Unavailable where it does not answer.
        """
        record = self.get(name)
        return record if self._is_unchanged(record) else self._examined_again(name)

    def _put(self, record: ModelRecord) -> None:
        with self._own_files.kept(record.info.parts):
            self._registry.put(record)

    def _known(self, name: str) -> ModelRecord | None:
        with suppress(ModelNotFound, InternalError):  # what cannot be read can still be replaced or deleted
            return self.get(name)
        return None

    def _let_go(self, record: ModelRecord) -> None:
        """Its computed prompts leave too, unless the file has another name, and so does a file of the server's own."""
        names = offload(self._registry.list).models
        if not self._serves_another(record, names):
            self._manager.unload(record, forget=all(other.digest != record.digest for other in names))
        offload(self._own_files.remove_unused, record.info.parts, self._registry.paths)

    def _serves_another(self, record: ModelRecord, names: Sequence[ModelRecord]) -> bool:
        """Whether its file is in memory for another name, which goes on with it."""
        loaded = {(model.record.path, model.record.identity): model.record.name for model in self._manager.loaded()}
        user = loaded.get((record.path, record.identity), record.name)
        return user != record.name and any(other.name == user for other in names)

    def _is_unchanged(self, record: ModelRecord) -> bool:
        path = Path(record.path)
        try:
            unchanged = self._patiently(path, self._patience_s, partial(self._identity, path)) == record.identity
        except BadModelFile:
            self._manager.unload(record)
            raise
        if not unchanged:
            self._manager.unload(record)
        return unchanged

    def _examined_again(self, name: str) -> ModelRecord:
        with self._examining:  # a crowd of requests proves it once
            record = self.get(name)
            if not self._is_unchanged(record):
                examined = self._examined(record.name, Path(record.path))
                self._prove_alone(examined)
                self._write(self._registry.renew, record, replace(examined, preset=record.preset))
            return self.get(name)

    def _examined(self, name: str, path: Path) -> ModelRecord:
        self._patiently(path, self._patience_s, partial(self._identity, path))  # a file system that hangs is told soon
        return self._patiently(path, self._patience_s + self._probe_timeout_s, partial(examine, name, path))

    def _prove_alone(self, record: ModelRecord) -> None:
        with self._proving:
            offload(self._prove, record)

    def _prove(self, record: ModelRecord) -> None:
        """Once, for each state of the file; and again when it killed a worker since."""
        if not self._verdicts.is_proved(record):
            prove(Path(record.path), timeout_s=self._probe_timeout_s)
            self._verdicts.prove(record)

    def _patiently(self, path: Path, timeout_s: float, look: Callable[[], T]) -> T:
        """A file system may never answer: neither do others wait for it, nor are all threads spent on it."""
        try:
            return self._files.call(str(path), timeout_s, look)
        except TimeoutError:
            raise Unavailable(f"{path} does not answer: its file system hangs; try again when it is back.") from None

    def _write(self, put: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """One after another, as they are in SQLite."""
        if not self._writing.acquire(timeout=self._patience_s):
            raise Unavailable("Other changes of the registry take long: try again.")
        try:
            offload(put, *args, **kwargs)
        finally:
            self._writing.release()


@contextmanager
def _discreetly(name: str) -> Iterator[None]:
    """Whose key is for some models hears no names of others. Raises Forbidden."""
    check_model(name)
    try:
        yield
    except ModelNotFound:
        if may_use_all():
            raise
        raise ModelNotFound(f"model '{name}' not found: `rustllama create` registers it.") from None
