"""API keys in the database: what is kept of them, and the verbs that make and remove them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rustllama.cli import verbs
from rustllama.errors import BadRequest, NotFound
from rustllama.keys import ApiKey, check_key_name, digest_of, new_secret
from rustllama.registry import Registry


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def run(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(verbs, ["key", *arguments], env={"RUSTLLAMA_HOME": str(home)})


def kept(home: Path) -> list[ApiKey]:
    return Registry(home / "rustllama.db").api_keys()


def test_a_key_is_printed_alone_and_only_its_digest_is_kept(home: Path) -> None:
    made = run(home, "add", "me")
    secret = made.stdout.strip()
    assert (made.exit_code, secret[:3]) == (0, "rl_")
    assert "RUSTLLAMA_API_KEY" in made.stderr
    assert [(key.name, key.digest) for key in kept(home)] == [("me", digest_of(secret))]
    files = [path for path in home.iterdir() if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in files)
    assert stat.S_IMODE(os.stat(home / "rustllama.db").st_mode) == 0o600


def test_the_options_of_a_key_are_kept_and_listed(home: Path) -> None:
    run(home, "add", "all")
    run(home, "add", "web", "--models", "Demo:latest, b", "--rate", "60/min", "--concurrency", "2", "--chat-only")
    _, web = kept(home)
    assert (web.models, web.rate_per_min, web.concurrency, web.may_manage) == (("demo", "b"), 60, 2, False)
    _, *rows = [re.split(r" {3,}", line.strip()) for line in run(home, "list").stdout.splitlines()]
    assert [(row[0], *row[2:]) for row in rows] == [
        ("all", "chat, manage", "all", "no limit", "no limit"),
        ("web", "chat", "demo, b", "60/min", "2"),
    ]


def test_a_removed_key_is_gone_and_its_name_is_free(home: Path) -> None:
    run(home, "add", "me")
    assert "Removed me." in run(home, "rm", "me").stdout
    assert kept(home) == []
    assert run(home, "add", "me").exit_code == 0


def test_a_name_that_is_taken_or_unknown_is_told(home: Path) -> None:
    run(home, "add", "me")
    taken, unknown = run(home, "add", "me").exception, run(home, "rm", "you").exception
    assert isinstance(taken, BadRequest)
    assert "`rustllama key rm me`" in str(taken)
    assert isinstance(unknown, NotFound)
    assert "`rustllama key list`" in str(unknown)
    assert len(kept(home)) == 1


@pytest.mark.parametrize("rate", ["0", "60/s", "-1", "x", "60/min/min"])
def test_a_rate_that_is_none_is_bad_usage(home: Path, rate: str) -> None:
    assert run(home, "add", "me", "--rate", rate).exit_code == 2


@pytest.mark.parametrize("name", ["", "a b", "-a", "a\n", "x" * 65, "a=b", "é"])
def test_a_name_that_is_unfit_for_the_log_is_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        check_key_name(name)


@pytest.mark.parametrize("verb", ["add", "list", "rm"])
def test_each_verb_shows_an_example(home: Path, verb: str) -> None:
    assert f"rustllama key {verb}" in run(home, verb, "--help").stdout


def test_keys_are_never_the_same_and_hold_256_bits() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert {len(secret) for secret in secrets} == {3 + 43}
