"""What is known of how a model file behaves: whether it was proved, and whether it killed workers since.

A verdict is of a file as it was (device, inode, size, time of change) and of one version of llama.cpp; the registry
keeps it among its facts. Two deaths put a model in quarantine, which ends by time, by another file, or by a new proof.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version

import msgspec

from rustllama.core import FileIdentity, ModelRecord
from rustllama.errors import Quarantined
from rustllama.registry import Registry

QUARANTINE_S = 600.0
_MOST_DEATHS = 2
_REMEMBERED_S = 3600.0  # a death
_LIBRARY = "llama-cpp-python"


class _Death(msgspec.Struct, frozen=True):
    signal: str
    at_s: float  # since the epoch


class _Verdict(msgspec.Struct, frozen=True):
    """Of a file; neither proved nor guilty where it is new."""

    identity: FileIdentity
    proved: bool = False
    deaths: tuple[_Death, ...] = ()

    @property
    def ends_s(self) -> float:
        """When its quarantine is over; long ago where there is none."""
        return self.deaths[-1].at_s + QUARANTINE_S if len(self.deaths) >= _MOST_DEATHS else 0.0


class Verdicts:
    """Every method blocks on a disk, and raises what the registry raises."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock
        self._fact = f"verdict of {_LIBRARY} {version(_LIBRARY)}"

    def is_proved(self, record: ModelRecord) -> bool:
        return self._of(record.digest, record.identity).proved

    def prove(self, record: ModelRecord) -> None:
        """It was proved just now: whatever it did before is forgiven."""
        self._keep(record.digest, _Verdict(record.identity, proved=True))

    def blame(self, digest: str, identity: FileIdentity, signal: str) -> bool:
        """A worker died of it, so that the proof is worth nothing. True where this puts it in quarantine."""
        now_s = self._clock()
        before = self._of(digest, identity).deaths
        recent = [death for death in before if now_s - death.at_s < _REMEMBERED_S]
        verdict = _Verdict(identity, deaths=(*recent, _Death(signal, now_s))[-_MOST_DEATHS:])
        self._keep(digest, verdict)
        return verdict.ends_s > now_s

    def check(self, record: ModelRecord) -> None:
        """Raises Quarantined."""
        verdict = self._of(record.digest, record.identity)
        left_s = verdict.ends_s - self._clock()
        if left_s > 0:
            last = verdict.deaths[-1]
            raise Quarantined(
                f"model '{record.name}' killed the server's process {len(verdict.deaths)} times, at "
                f"{_moment(last.at_s)} with {last.signal}, so it is in quarantine until {_moment(verdict.ends_s)}: "
                "create it again, or replace its file, to try it sooner.",
                int(left_s) + 1,
            )

    def _of(self, digest: str, identity: FileIdentity) -> _Verdict:
        text = self._registry.fact(digest, self._fact)
        try:
            verdict = None if text is None else msgspec.json.decode(text, type=_Verdict)
        except msgspec.DecodeError:
            verdict = None
        return verdict if verdict is not None and verdict.identity == identity else _Verdict(identity)

    def _keep(self, digest: str, verdict: _Verdict) -> None:
        self._registry.keep_fact(digest, self._fact, msgspec.json.encode(verdict).decode())


def _moment(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_s))
