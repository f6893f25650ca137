"""What was learned of models on this machine, by the digest of their files: it outlives the server."""

from __future__ import annotations

import logging
from typing import TypeVar

import msgspec

from rustllama import bridge
from rustllama.core import ModelRecord
from rustllama.errors import RustllamaError
from rustllama.registry import Registry
from rustllama.verdicts import Verdicts

T = TypeVar("T")
_log = logging.getLogger("rustllama.engine")


class Facts:
    """Called in the hub. What is not known is learned again, so that a registry that fails is only told in the log."""

    def __init__(self, registry: Registry | None = None) -> None:
        """Without a registry nothing is remembered."""
        self._registry = registry

    def check(self, record: ModelRecord) -> None:
        """Raises Quarantined where it killed workers; see `verdicts`."""
        if self._registry is not None:
            bridge.offload(Verdicts(self._registry).check, record)

    def get(self, digest: str, name: str, kind: type[T]) -> T | None:
        """The fact, when it is known and a `kind`, like `int` or a dataclass."""
        if self._registry is None:
            return None
        try:
            text = bridge.offload(self._registry.fact, digest, name)
            return None if text is None else msgspec.json.decode(text, type=kind)
        except (RustllamaError, msgspec.DecodeError) as error:
            _log.warning("the fact '%s' could not be read: %s", name, error)
            return None

    def keep(self, digest: str, name: str, value: object) -> None:
        """`value` is what msgspec can write as JSON."""
        if self._registry is None:
            return
        try:
            bridge.offload(self._registry.keep_fact, digest, name, msgspec.json.encode(value).decode())
        except RustllamaError as error:
            _log.warning("the fact '%s' could not be kept: %s", name, error)
