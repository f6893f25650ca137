"""Verdicts on model files: proved once for each state of a file, in quarantine after two deaths, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rustllama.core import ModelRecord
from rustllama.errors import Quarantined
from rustllama.registry import Registry
from rustllama.verdicts import QUARANTINE_S, Verdicts
from tests.test_registry import NOWHERE, record

TOY = record("toy")
CHANGED = replace(TOY, identity=replace(TOY.identity, mtime_ns=5))


@dataclass(slots=True)
class Clock:
    now_s: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verdicts(tmp_path: Path, clock: Clock) -> Iterator[Verdicts]:
    with closing(Registry(tmp_path / "rustllama.db", bundled=NOWHERE)) as registry:
        yield Verdicts(registry, clock)


def blame(verdicts: Verdicts, times: int = 2) -> list[bool]:
    return [verdicts.blame(TOY.digest, TOY.identity, "SIGSEGV") for _ in range(times)]


def is_locked_up(verdicts: Verdicts, model: ModelRecord = TOY) -> bool:
    try:
        verdicts.check(model)
    except Quarantined:
        return True
    return False


def test_a_file_is_proved_as_it_is(verdicts: Verdicts) -> None:
    assert not verdicts.is_proved(TOY)
    verdicts.prove(TOY)
    assert verdicts.is_proved(replace(TOY, name="another", path="/b.gguf"))
    assert not verdicts.is_proved(CHANGED)


def test_the_second_death_puts_it_in_quarantine(verdicts: Verdicts) -> None:
    assert not is_locked_up(verdicts)
    assert blame(verdicts, 1) == [False]
    assert not is_locked_up(verdicts)
    assert blame(verdicts, 1) == [True]
    assert is_locked_up(verdicts)


def test_the_sentence_says_what_happened_and_what_ends_it(verdicts: Verdicts) -> None:
    blame(verdicts)
    with pytest.raises(
        Quarantined, match=r"^model 'toy' killed .* 2 times, .* SIGSEGV, .* until \d\d:\d\d:\d\d"
    ) as caught:
        verdicts.check(TOY)
    assert "create it again, or replace its file" in str(caught.value)
    assert caught.value.retry_after_s == QUARANTINE_S + 1


def test_it_ends_by_itself(verdicts: Verdicts, clock: Clock) -> None:
    blame(verdicts)
    clock.now_s += QUARANTINE_S - 1
    assert is_locked_up(verdicts)
    clock.now_s += 1
    assert not is_locked_up(verdicts)


def test_one_more_death_soon_after_is_enough(verdicts: Verdicts, clock: Clock) -> None:
    blame(verdicts)
    clock.now_s += QUARANTINE_S + 1
    assert blame(verdicts, 1) == [True]


def test_a_death_of_long_ago_does_not_count(verdicts: Verdicts, clock: Clock) -> None:
    blame(verdicts, 1)
    clock.now_s += 2 * 3600
    assert blame(verdicts, 1) == [False]


def test_a_changed_file_is_not_guilty(verdicts: Verdicts) -> None:
    blame(verdicts)
    assert not is_locked_up(verdicts, CHANGED)


def test_a_death_takes_the_proof_away_and_a_proof_ends_the_quarantine(verdicts: Verdicts) -> None:
    verdicts.prove(TOY)
    blame(verdicts)
    assert not verdicts.is_proved(TOY)
    verdicts.prove(TOY)
    assert not is_locked_up(verdicts)
