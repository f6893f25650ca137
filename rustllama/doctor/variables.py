"""The settings in the environment: those that cannot be read, and those that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from rustllama.client import API_KEY, CA
from rustllama.doctor.finding import Finding, hint, ok, wrong
from rustllama.errors import SettingError
from rustllama.settings import Settings, table

_PREFIX = "RUSTLLAMA_"


def examine(environ: Mapping[str, str]) -> tuple[Settings, list[Finding]]:
    """The settings that can be read, with defaults for the others."""
    known = {variable for variable, _, _ in table()}
    ours = {name: value for name, value in environ.items() if name.startswith(_PREFIX)}
    findings, good = [], {}
    for name, value in sorted(ours.items()):
        if name in known:
            try:
                Settings.from_env({name: value})
                good[name] = value
            except SettingError as error:
                findings.append(wrong("settings", f"{error} Until then nothing starts."))
        elif name not in (API_KEY, CA):
            findings.append(_stranger(name, known))
    if not findings:
        findings.append(ok("settings", f"{len(good)} in the environment." if good else "all have their defaults."))
    return Settings.from_env(good), findings


def _stranger(name: str, known: set[str]) -> Finding:
    nearest = difflib.get_close_matches(name, known, 1)
    meant = f": did you mean {nearest[0]}?" if nearest else "; `rustllama serve --help` lists all."
    return hint("settings", f"{name} is no setting{meant}")
