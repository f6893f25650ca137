"""How llama.cpp's threads wait for each other: set before libgomp is loaded, which reads it once.

Between two operations each thread waits for the others, hundreds of times in a call. libgomp's own 300,000 turns of
waiting are milliseconds in which a core that somebody else needs, mostly another of these threads, does nothing: two
programs that compute so on the same cores all but stand still. With none ("passive"), each wait costs a system call.
Elsewhere than on x86 a turn is short, and so is libgomp's own wait.
"""

from __future__ import annotations

import os
import platform

_TURNS = 10_000  # a few hundred microseconds: an even share of work ends well within, and decoding alone costs no more

if platform.machine() in ("x86_64", "AMD64") and not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = str(_TURNS)
