"""Which of a repository's GGUF files are one model in which quantization, and which of these to take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rustllama.errors import BadRequest

PREFERRED = "Q4_K_M"

_LABEL = re.compile(
    r"(?:^|[-_./])((?:UD-)?(?:I?Q|TQ)\d[A-Z0-9_]*|MXFP4(?:_MOE)?|BF16|F16|F32)(?=[-./]|$)", re.IGNORECASE
)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_BESIDE = re.compile(r"(^|[-_./])(mmproj|imatrix|mtp|eagle3|dflash|dspark)([-_./]|$)", re.IGNORECASE)
_BITS = {"BF16": 16.0, "F16": 16.1, "F32": 32.0, "MXFP4": 4.25, "MXFP4_MOE": 4.25}
_FINENESS = {"XXS": 0.1, "XS": 0.25, "S": 0.55, "0": 0.5, "1": 0.9, "NL": 0.5, "M": 0.85, "L": 1.2, "XL": 1.3, "K": 0.6}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a repository; its path is whatever the repository says."""

    path: str
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Variant:
    """One model in one quantization; its parts in order."""

    label: str  # like "Q4_K_M"; what tells it from others where it names no quantization
    parts: tuple[Entry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def bits(self) -> float:
        """About as many as it has for a weight, to compare with others."""
        label = self.label.upper().removeprefix("UD-")
        if label in _BITS:
            return _BITS[label]
        found = re.match(r"(?:I?Q|TQ)(\d)", label)
        return int(found[1]) + _FINENESS.get(label.rpartition("_")[2], 0.4) if found else 99.0


def variants(entries: Iterable[Entry]) -> list[Variant]:
    """The complete models, the smallest first; without projectors and other files that are no models."""
    parts: dict[str, dict[int, Entry]] = {}
    counts: dict[str, int] = {}
    for entry in entries:
        stem, dot, suffix = entry.path.rpartition(".")
        if not dot or suffix.lower() != "gguf" or _BESIDE.search(stem):
            continue
        split = _SPLIT.search(stem)
        key = stem[: split.start()] if split else stem
        parts.setdefault(key, {})[int(split[1]) if split else 1] = entry
        counts[key] = int(split[2]) if split else 1
    whole = (key for key, found in parts.items() if sorted(found) == list(range(1, counts[key] + 1)))
    made = (Variant(_label(key), tuple(parts[key][number] for number in sorted(parts[key]))) for key in whole)
    return sorted(made, key=lambda variant: (variant.size_bytes, variant.label))


def projectors(entries: Iterable[Entry]) -> list[Entry]:
    """The files that let a model see or hear."""
    return [entry for entry in entries if entry.path.lower().endswith(".gguf") and "mmproj" in entry.path.lower()]


def choose(found: Sequence[Variant], wanted: str | None, place: str) -> Variant:
    """The one that is wanted; without a wish the preferred one, else the nearest to it. Raises BadRequest."""
    if not found:
        raise BadRequest(f"{place} has no GGUF file: look for a repository whose name ends in -GGUF.", "model")
    if wanted is None:
        aim = Variant(PREFERRED, ()).bits
        same = [variant for variant in found if variant.label.upper() == PREFERRED]
        return same[0] if same else min(found, key=lambda variant: (abs(variant.bits - aim), variant.size_bytes))
    for variant in found:
        if variant.label.lower() == wanted.lower():
            return variant
    listed = ", ".join(f"{variant.label} ({variant.size_bytes / 1e9:.1f} GB)" for variant in found)
    lacks = f" and no '{wanted[:40]}'" if wanted else ""
    raise BadRequest(f"{place} has {listed}{lacks}: name one behind the ':'.", "model")


def _label(key: str) -> str:
    """The last thing in the name that reads as a quantization; its folder counts too."""
    found = _LABEL.findall(key)
    return found[-1].upper() if found else key.rpartition("/")[2]
