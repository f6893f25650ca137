"""The registry: names, order, durability, and what happens when SQLite cannot."""

from __future__ import annotations

import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from rustllama.core import FileIdentity, ModelInfo, ModelRecord
from rustllama.errors import BadRequest, DiskFull, InternalError, ModelNotFound, ReadOnly, SettingError, Unavailable
from rustllama.registry import _MIGRATIONS, Registry, canonical, check_name, examine, timestamp
from tests.toys import write_toy

INFO = ModelInfo(
    architecture="llama",
    parameter_count=1,
    quantization="F32",
    size_bytes=1,
    parts=("/a.gguf",),
    block_count=2,
    context_length=512,
    embedding_length=32,
    head_count=4,
    head_count_kv=(2, 0),
    key_length=8,
    value_length=8,
    vocabulary_size=4,
    chat_template="{{ 'é' }}",
    metadata={"general.name": "toy", "a.list": [1, 2.5, True], "an.int": 1 << 63},
)
NOWHERE = Path("/nowhere/demo.gguf")
Start = Callable[..., Registry]


def record(name: str, path: str = "/a.gguf") -> ModelRecord:
    return ModelRecord(name, path, timestamp(), "0" * 64, FileIdentity(1, 2, 3, 4), INFO)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Opens the registry of this test with a bundled model, again and again."""
    with ExitStack() as opened:

        def start(bundled: Path = NOWHERE) -> Registry:
            registry = Registry(tmp_path / "home" / "rustllama.db", bundled=bundled, busy_timeout_s=0.01)
            return opened.enter_context(closing(registry))

        yield start


@pytest.fixture
def registry(start: Start) -> Registry:
    """An empty one."""
    return start()


@pytest.fixture
def other(tmp_path: Path, registry: Registry) -> Iterator[sqlite3.Connection]:
    """A connection of another program to the same database."""
    with closing(sqlite3.connect(tmp_path / "home" / "rustllama.db", isolation_level=None)) as connection:
        yield connection


def names(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.list().models]


def test_what_was_put_comes_back(registry: Registry) -> None:
    given = record("llama3.2")
    registry.put(given)
    assert registry.get("llama3.2") == given


def test_a_name_means_the_same_with_its_tag_spaces_and_capitals(registry: Registry) -> None:
    registry.put(record("Llama3.2"))
    assert registry.get(" llama3.2:latest ").name == "Llama3.2"
    registry.put(record("LLAMA3.2:latest"))
    assert names(registry) == ["LLAMA3.2:latest"]


def test_another_tag_is_another_model(registry: Registry) -> None:
    registry.put(record("a"))
    registry.put(record("a:8b"))
    assert sorted(names(registry)) == ["a", "a:8b"]


def test_the_newest_is_listed_first_and_demo_last(registry: Registry) -> None:
    for name in ("old", "demo", "new"):
        registry.put(record(name))
    assert names(registry) == ["new", "old", "demo"]
    registry.put(record("old"))
    assert names(registry) == ["old", "new", "demo"]


def test_an_unknown_name_lists_those_that_exist(registry: Registry) -> None:
    with pytest.raises(ModelNotFound, match="model 'x' not found: none is registered yet"):
        registry.get("x")
    registry.put(record("b"))
    registry.put(record("a"))
    with pytest.raises(ModelNotFound, match=r"model 'x' not found: there are 'a', 'b'$"):
        registry.get("x")


def test_an_unknown_name_among_very_many_gives_a_short_sentence(registry: Registry) -> None:
    for number in range(30):
        registry.put(record(f"model{number}"))
    with pytest.raises(ModelNotFound) as caught:
        registry.get("x")
    assert len(str(caught.value)) < 400


def test_delete_forgets_the_name_once(registry: Registry) -> None:
    registry.put(record("a"))
    registry.delete("A:latest")
    assert names(registry) == []
    with pytest.raises(ModelNotFound, match="model 'a' not found"):
        registry.delete("a")


@pytest.mark.parametrize("name", ["llama3.2", "a/b:c", "hf.co/Org/Model-7B.Q4_K_M:latest", " padded "])
def test_good_names(name: str) -> None:
    assert check_name(name) == name.strip()


@pytest.mark.parametrize("name", ["", " ", "a b", "../a", "/a", "a/", "a:b:c", "a//b", ".a", "é", "x" * 201, "a\0"])
def test_bad_names_are_told_the_grammar(name: str, registry: Registry) -> None:
    with pytest.raises(BadRequest, match=r"letters, digits") as caught:
        registry.put(record(name))
    assert caught.value.field == "name"


def test_canonical_names() -> None:
    assert canonical(" Demo:Latest ") == "demo"
    assert canonical("demo:8b") == "demo:8b"


def test_a_timestamp_has_nanoseconds_and_a_zone() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.000000007[+-]\d\d:\d\d", timestamp(1_728_000_000_000_000_007))


def test_the_bundled_model_is_there_in_a_new_database(tmp_path: Path, start: Start) -> None:
    registry = start(write_toy(tmp_path / "demo.gguf"))
    assert registry.get("demo").path == str(tmp_path / "demo.gguf")
    assert registry.get("demo").info.architecture == "llama"


def test_deleting_the_bundled_model_sticks(tmp_path: Path, start: Start) -> None:
    bundled = write_toy(tmp_path / "demo.gguf")
    start(bundled).delete("demo")
    assert names(start(bundled)) == []


def test_the_bundled_model_follows_a_moved_installation(tmp_path: Path, start: Start) -> None:
    (tmp_path / "old/rustllama/demo").mkdir(parents=True)
    start(write_toy(tmp_path / "old/rustllama/demo/demo.gguf"))
    moved = (tmp_path / "old/rustllama/demo/demo.gguf").rename(tmp_path / "demo.gguf")
    assert start(moved).get("demo").path == str(moved)


def test_a_new_version_of_the_bundled_model_is_seen(tmp_path: Path, start: Start) -> None:
    bundled = write_toy(tmp_path / "demo.gguf")
    before = start(bundled).get("demo")
    write_toy(bundled, seed=1, layers=2)
    after = start(bundled).get("demo")
    assert (before.info.block_count, after.info.block_count) == (3, 2)
    assert before.digest != after.digest


def test_a_demo_of_the_users_own_is_left_alone(tmp_path: Path, start: Start) -> None:
    bundled = write_toy(tmp_path / "demo.gguf")
    start(bundled).put(record("demo", "/mine.gguf"))
    assert start(bundled).get("demo").path == "/mine.gguf"


def test_a_damaged_bundled_model_does_not_stop_the_registry(tmp_path: Path, start: Start) -> None:
    (tmp_path / "demo.gguf").write_bytes(b"broken")
    assert names(start(tmp_path / "demo.gguf")) == []


def test_examine_describes_a_file(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf")
    examined = examine("toy", path)
    assert (examined.name, examined.path, examined.identity.size_bytes) == ("toy", str(path), path.stat().st_size)


def test_the_state_is_private(tmp_path: Path, registry: Registry) -> None:
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "home/rustllama.db").stat().st_mode) == 0o600


def test_a_place_that_cannot_be_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"RUSTLLAMA_HOME=.*cannot hold the state"):
        Registry(tmp_path / "file" / "rustllama.db", bundled=NOWHERE)


def test_a_database_of_a_newer_version_is_not_touched(start: Start, other: sqlite3.Connection) -> None:
    other.execute("PRAGMA user_version = 99")
    with pytest.raises(SettingError, match="of a newer rustllama"):
        start()


def test_a_locked_database_is_unavailable_and_can_be_read(registry: Registry, other: sqlite3.Connection) -> None:
    registry.put(record("a"))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked by another program"):
        registry.put(record("b"))
    assert names(registry) == ["a"]
    other.execute("ROLLBACK")
    registry.put(record("b"))


def test_a_full_disk_has_its_own_error_and_recovers(registry: Registry) -> None:
    """SQLite answers for a database that may not grow as it does for a full disk."""
    registry._database.pragma("max_page_count", registry._database.pragma("page_count"))
    large = replace(record("a"), info=replace(INFO, chat_template="x" * 100_000))
    with pytest.raises(DiskFull, match="is full"):
        registry.put(large)
    registry._database.pragma("max_page_count", 1 << 20)
    registry.put(large)


def test_an_unreadable_entry_is_told_by_name(registry: Registry, other: sqlite3.Connection) -> None:
    registry.put(record("a"))
    other.execute("UPDATE model SET info = '{}'")
    with pytest.raises(InternalError, match="says of 'a' cannot be read; create it again"):
        registry.get("a")


def test_an_unreadable_entry_does_not_hide_the_others(registry: Registry, other: sqlite3.Connection) -> None:
    registry.put(record("a"))
    other.execute("UPDATE model SET info = '{}'")
    registry.put(record("b"))
    assert names(registry) == ["b"]
    (warning,) = registry.list().warnings
    assert "says of 'a' cannot be read" in warning
    registry.put(record("a"))
    assert (names(registry), registry.list().warnings) == (["a", "b"], ())


def test_a_record_is_renewed_where_it_still_stands(registry: Registry) -> None:
    old, new = record("a"), record("a", "/new.gguf")
    registry.renew(old, new)
    assert names(registry) == []  # nothing comes back that was deleted
    registry.put(old)
    registry.renew(old, new)
    registry.renew(old, record("a", "/newer.gguf"))
    assert registry.get("a").path == "/new.gguf"


def test_threads_have_connections_of_their_own(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "rustllama.db", bundled=NOWHERE)

    def work(number: int) -> None:
        for _ in range(20):
            registry.put(record(f"model{number}"))
            assert registry.get(f"model{number}").name == f"model{number}"
        registry.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.list().models) == 4
    registry.close()


WRITER = """
import sys
from pathlib import Path
from rustllama.registry import Registry
from tests.test_registry import NOWHERE, record
registry = Registry(Path(sys.argv[1]), bundled=NOWHERE)
for number in range(10_000):
    registry.put(record(f"{sys.argv[2]}-{number}"))
    print(number, flush=True)
"""


def writer(path: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, path, name], stdout=subprocess.PIPE, text=True)


def test_processes_may_share_a_database_and_die(tmp_path: Path, start: Start) -> None:
    """Three open one new database at once; what each acknowledged before it was killed is there."""
    path = tmp_path / "home" / "rustllama.db"
    acknowledged = {}
    for name, process in [(name, writer(path, name)) for name in "abc"]:
        assert process.stdout is not None
        while (number := int(process.stdout.readline())) < 20:
            pass
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split("\n")
        acknowledged[name] = max([number, *(int(line) for line in rest[:-1])])
    there = set(names(start()))
    assert {f"{name}-{n}" for name, last in acknowledged.items() for n in range(last + 1)} <= there
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_facts_of_a_file_are_kept_by_name_and_replaced(start: Start) -> None:
    registry = start()
    registry.keep_fact("d1", "slots", "1")
    registry.keep_fact("d1", "slots", "2")
    registry.keep_fact("d1", "other", "3")
    assert [start().fact("d1", name) for name in ("slots", "other", "none")] == ["2", "3", None]
    assert registry.fact("d2", "slots") is None


def test_a_database_of_an_older_version_learns_what_is_new(tmp_path: Path, start: Start) -> None:
    (tmp_path / "home").mkdir()
    with closing(sqlite3.connect(tmp_path / "home" / "rustllama.db")) as older:
        older.execute(_MIGRATIONS[0])
        older.execute("PRAGMA user_version = 1")
    registry = start()
    registry.keep_fact("d", "n", "1")
    assert (names(registry), registry.fact("d", "n")) == ([], "1")


def test_a_read_only_database_is_told_and_can_be_read(registry: Registry) -> None:
    registry.put(record("a"))
    registry._database.pragma("query_only", 1)
    with pytest.raises(ReadOnly, match="cannot be written"):
        registry.put(record("b"))
    assert names(registry) == ["a"]
