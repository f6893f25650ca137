"""`rustllama doctor`: what this machine has and could run, and what is wrong with the installation.

It looks and changes nothing; whatever is broken becomes a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from rustllama.doctor import address, hardware, library, state, variables
from rustllama.doctor.finding import Finding, wrong
from rustllama.errors import RustllamaError


def examine(environ: Mapping[str, str]) -> list[Finding]:
    """All findings, about one thing after another."""
    settings, findings = variables.examine(environ)
    looks: dict[str, Callable[[], Iterable[Finding]]] = {
        "state folder": partial(state.examine, settings),
        "address": partial(address.examine, settings, environ),
        "llama.cpp": library.examine,
        "machine": partial(hardware.examine, settings),
    }
    for about, look in looks.items():
        try:
            findings.extend(look())
        except (OSError, RustllamaError, ValueError, MemoryError) as error:
            findings.append(wrong(about, f"it could not be looked at: {error}."))
    return findings
