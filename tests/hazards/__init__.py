"""The acceptance table: what no request, file, page or crash may do to a server. `tox -e hazards` runs the whole of it.

Each test is a row. `tox` runs a quick form of each, which leaves limits of time and memory alone, as it may share its
machine with anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

WHOLE = bool(os.environ.get("HAZARDS"))

T = TypeVar("T")


def times(whole: int, quick: int) -> int:
    """How often something happens."""
    return whole if WHOLE else quick


def some(cases: Iterable[T], *, one_in: int = 4) -> list[T]:
    """All cases; fewer in the quick form."""
    return list(cases)[:: times(1, one_in)]
