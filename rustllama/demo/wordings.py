"""Owns the files of wordings: reads their sections, expands alternatives and fills slots.

A file of `wordings/` holds sections `[name]` with one wording a line; `{a|b}` stands for one of the alternatives and
`<slot>` for a word that the caller fills in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

FOLDER = Path(__file__).parent / "wordings"
INTENT_FILES = ("verbs", "requests", "console", "errors", "setup", "small_talk", "general")
_CHOICE = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"<(\w+)>")


def sections(name: str) -> dict[str, list[str]]:
    """The lines of each section of `wordings/NAME.txt`; those before the first `[section]` are under ""."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split("\n"):
        if line.startswith("[") and line.endswith("]"):
            current = line[1:-1]
            found[current] = []
        elif line:
            found[current].append(line)
    return found


def intent_wordings() -> dict[str, list[str]]:
    """Every wording of every intent, by the id of the intent, alternatives not yet expanded."""
    return {key: lines for name in INTENT_FILES for key, lines in sections(name).items() if key}


def expand(line: str, rng: Random) -> str:
    """One reading of a wording: an alternative drawn for each `{a|b}`, spaces tidied."""
    return " ".join(_CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), line).split())


def expansions(line: str) -> list[str]:
    """All readings of a wording, spaces tidied."""
    match = _CHOICE.search(line)
    if match is None:
        return [" ".join(line.split())]
    head, tail = line[: match.start()], line[match.end() :]
    return [text for part in match.group(1).split("|") for text in expansions(head + part + tail)]


def fill(line: str, slots: Callable[[str], str]) -> str:
    """The line with each `<slot>` replaced by what `slots` gives for its name, asked anew each time."""
    return _SLOT.sub(lambda match: slots(match.group(1)), line)


def normal(text: str) -> str:
    """Lower case, letters and digits only: two sentences that differ in punctuation alone are equal."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
