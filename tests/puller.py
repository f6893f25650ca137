"""A pull without a server: small blocks, short pauses, and all that it tells is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

from rustllama.pull.progress import Fetched, Progress
from rustllama.pull.pulling import Pulling
from rustllama.pull.retries import Pauses
from rustllama.pull.source import parse
from rustllama.pull.store import Store
from rustllama.pull.web import Web

BLOCK = 64_000
SOON = (0.01, 0.01, 0.01)


class Puller:
    """Pulls into a folder, and keeps what is told."""

    def __init__(
        self,
        folder: Path,
        *,
        stall_s: float = 10.0,
        public_only: bool = False,
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._environ = environ
        self.store = Store(folder / "models")
        self.told: list[Progress] = []
        self.once_begun: Callable[[], None] | None = None
        self._public_only = public_only
        self._stall_s = stall_s

    def pull(self, source: str, *, registry: str = "") -> Fetched:
        with closing(Web(public_only=self._public_only, stall_s=self._stall_s)) as web:
            pulling = Pulling(
                self.store,
                web,
                self._tell,
                environ=self._environ,
                block_bytes=BLOCK,
                pauses=Pauses(SOON, SOON),
            )
            return pulling.run(parse(source, registry=registry))

    def _tell(self, progress: Progress) -> None:
        self.told.append(progress)
        if progress.total and self.once_begun is not None:
            begun, self.once_begun = self.once_begun, None
            begun()

    def says(self, words: str) -> bool:
        return any(words in line.status for line in self.told)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.store.partial.iterdir())
