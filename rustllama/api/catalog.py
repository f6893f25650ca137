"""The models that requests name: created, listed, deleted, and examined again when their file has changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rustllama import gguf
from rustllama.api.keys import check_model, may_use, may_use_all
from rustllama.bridge import RLock, offload
from rustllama.core import ModelRecord
from rustllama.engine.manager import EngineManager
from rustllama.errors import ModelNotFound
from rustllama.probe import prove
from rustllama.registry import Registry, examine
from rustllama.settings import Settings
from rustllama.verdicts import Verdicts

T = TypeVar("T")


class Catalog:
    """Called from the hub's greenlets; files and the database are touched in worker threads."""

    def __init__(self, settings: Settings, registry: Registry, manager: EngineManager) -> None:
        self._registry = registry
        self._verdicts = Verdicts(registry)
        self._manager = manager
        self._probe_timeout_s = settings.probe_timeout
        self._examining = RLock()
        self._proving = RLock()  # one at a time: each takes the memory of its model, and one of few threads

    def list(self) -> list[ModelRecord]:
        """Those that the request's key may use."""
        return [record for record in offload(self._registry.list) if may_use(record.name)]

    def get(self, name: str) -> ModelRecord:
        """Raises ModelNotFound, and Forbidden where the request's key is for other models: so do all that follow."""
        return self._found(self._registry.get, name)

    def create(self, name: str, path: str) -> None:
        """Examines and proves the file, then gives it the name; answers of a model replaced by it end well.

        Raises BadModelFile, OutOfMemory, DiskFull or InternalError.
        """
        check_model(name)
        absolute = Path(os.path.abspath(os.path.expanduser(path)))
        replaced = self._examine_and_put(name, absolute)
        if replaced is not None:
            self._let_go(replaced)

    def delete(self, name: str) -> None:
        """Raises ModelNotFound. The file stays."""
        with self._examining:  # or what is examined again would come back
            record = self.get(name)
            offload(self._registry.delete, name)
        self._let_go(record)

    def current(self, name: str) -> ModelRecord:
        """The record to load: as `get`, but proved again when the file is not the one that was examined.

        Raises ModelNotFound, or BadModelFile where the file is gone or spoilt.
        """
        record, unchanged = self._found(self._look, name)
        return record if unchanged else self._examined_again(name)

    def _found(self, find: Callable[[str], T], name: str) -> T:
        """What `find` says of a model, in a worker thread. Who may use some models hears no names of others."""
        check_model(name)
        try:
            return offload(find, name)
        except ModelNotFound:
            if may_use_all():
                raise
            raise ModelNotFound(f"model '{name}' not found: `rustllama create` registers it.") from None

    def _let_go(self, record: ModelRecord) -> None:
        """Its computed prompts leave too, unless the file has another name."""
        forget = all(other.digest != record.digest for other in offload(self._registry.list))
        self._manager.unload(record, forget=forget)

    def _examined_again(self, name: str) -> ModelRecord:
        with self._examining:  # a crowd of requests proves it once
            record, unchanged = offload(self._look, name)
            if unchanged:
                return record
            self._manager.unload(record)
            self._examine_and_put(record.name, Path(record.path))
            return self.get(name)

    def _look(self, name: str) -> tuple[ModelRecord, bool]:
        record = self._registry.get(name)
        return record, gguf.identity(Path(record.path)) == record.identity

    def _examine_and_put(self, name: str, path: Path) -> ModelRecord | None:
        """Returns the record that had the name before."""
        record = offload(examine, name, path)
        with self._proving:
            offload(self._prove, record)
        return offload(self._put, record)

    def _prove(self, record: ModelRecord) -> None:
        """Once, for each state of the file; and again when it killed a worker since."""
        if not self._verdicts.is_proved(record):
            prove(Path(record.path), timeout_s=self._probe_timeout_s)
            self._verdicts.prove(record)

    def _put(self, record: ModelRecord) -> ModelRecord | None:
        try:
            replaced = self._registry.get(record.name)
        except ModelNotFound:
            replaced = None
        self._registry.put(record)
        return replaced
