"""What a pull tells while it runs, and what it has in the end."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from rustllama.core import Preset


class Progress(Struct, frozen=True, omit_defaults=True):
    """A line of Ollama's `/api/pull`; digest as "sha256:…", the rest in bytes."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


class Fetched(Struct, frozen=True):
    """A model that is there: its files, of which the first is named to load it, and what came with it."""

    paths: list[str]  # absolute
    preset: Preset


Tell = Callable[[Progress], None]
