"""Facts of models outlive the server, and a registry that fails costs only what they would have saved."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rustllama.engine.facts import Facts
from rustllama.registry import Registry
from tests.test_registry import NOWHERE


@pytest.fixture
def facts(tmp_path: Path) -> Iterator[Facts]:
    with closing(Registry(tmp_path / "rustllama.db", bundled=NOWHERE, busy_timeout_s=0.01)) as registry:
        yield Facts(registry)


def test_a_fact_comes_back_with_its_type(facts: Facts) -> None:
    facts.keep("digest", "slots", {512: 4})
    assert facts.get("digest", "slots", dict[int, int]) == {512: 4}


def test_what_is_not_known_or_of_another_kind_is_none(facts: Facts) -> None:
    facts.keep("digest", "slots", "many")
    assert facts.get("digest", "slots", int) is None
    assert facts.get("digest", "other", int) is None


def test_a_registry_that_cannot_be_written_is_told_in_the_log(
    facts: Facts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(tmp_path / "rustllama.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        facts.keep("digest", "slots", 1)
    assert "locked by another program" in caplog.text


def test_without_a_registry_nothing_is_remembered() -> None:
    facts = Facts()
    facts.keep("digest", "slots", 1)
    assert facts.get("digest", "slots", int) is None
