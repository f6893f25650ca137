"""A child process gives way to the answers, in the kernel's own words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")
PROGRAM = f"""
import os
from pathlib import Path
from rustllama.rlimits import give_way
path = Path({str(AUTOGROUP)!r})
of_session = lambda: path.read_text().split()[-1:] if path.exists() else []  # the first one of the machine has none
before = of_session()
give_way(7)
print(os.nice(0), *before, *of_session())
"""


def given_way(*, own_session: bool) -> list[str]:
    """The nice value of the process, and those of its session before and after."""
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(
        command, start_new_session=own_session, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel does not group processes by their sessions")
def test_a_session_of_its_own_gives_way_too() -> None:
    assert given_way(own_session=True) == ["7", "0", "7"]


def test_the_session_of_others_stays_as_it_is() -> None:
    nice, *session = given_way(own_session=False)
    assert nice == "7"
    assert session[:1] == session[1:]
