"""What a source offers, once it was asked: the files of one model, and what comes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class File:
    """To be fetched. Digest and size as the source promises them."""

    url: str
    sha256: str = ""  # hexadecimal; "": not told
    size_bytes: int | None = None  # None: not told


@dataclass(frozen=True, slots=True)
class Offer:
    origin: str
    files: tuple[File, ...]  # more than one: the parts of a split model, in order
    license: str = ""
    system: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the user should know of it
