"""One line of what `rustllama doctor` found."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Mark(enum.Enum):
    OK = "ok"
    HINT = "hint"  # it works, and could be better
    WRONG = "wrong"  # it does not, or will not for long


@dataclass(frozen=True, slots=True)
class Finding:
    """`text` is a sentence that also says what to do, if anything; `facts` are its numbers, for programs."""

    about: str
    mark: Mark
    text: str
    facts: Mapping[str, object] = field(default_factory=dict)


def ok(about: str, text: str, **facts: object) -> Finding:
    return Finding(about, Mark.OK, text, facts)


def hint(about: str, text: str, **facts: object) -> Finding:
    return Finding(about, Mark.HINT, text, facts)


def wrong(about: str, text: str, **facts: object) -> Finding:
    return Finding(about, Mark.WRONG, text, facts)
