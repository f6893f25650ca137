"""What the kernel lets this process have, for children that do with strangers' files what might never end."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path


def lower(what: int, limit: int) -> None:
    """Sets the soft limit `what` (`resource.RLIMIT_*`), at most to the hard one."""
    hard = resource.getrlimit(what)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(what, (limit, hard))


def give_way(nice: int) -> None:
    """Others compute first; `nice` is 1 to 19.

    Linux ranks a process so among those of its session alone and shares the cores out between sessions: see
    "autogroup" in sched(7). So a session of this process's own, with no other program in it, gives way as well.
    """
    os.nice(nice)
    if sys.platform == "linux" and os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice))


def leave_first() -> None:
    """Where memory is short, Linux ends this process before others."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
