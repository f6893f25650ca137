"""The kernel's limits on this process, for children that do with strangers' files what might never end."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def lower(what: int, limit: int) -> None:
    """Sets the soft limit `what` (`resource.RLIMIT_*`), at most to the hard one."""
    hard = resource.getrlimit(what)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(what, (limit, hard))


def leave_first() -> None:
    """Where memory is short, Linux ends this process before others."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
