"""The console's own files in the state folder: history, the last model, the private server's log."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Home:
    """A state folder that may not exist yet, and that the console can do without where it cannot be written."""

    path: Path

    def file(self, name: str) -> Path:
        """The path of a file that exists and that only its owner may read. Raises OSError."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.path / name
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)
        return path

    def last_model(self) -> str | None:
        with contextlib.suppress(OSError):
            return (self.path / "last-model").read_text(encoding="utf-8", errors="replace").strip() or None
        return None

    def remember(self, model: str) -> None:
        with contextlib.suppress(OSError):
            self.file("last-model").write_text(model, encoding="utf-8")
