"""States on disk: believed only when they are what was written, and within their limit."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rustllama.engine.state_folder import StateFolder
from rustllama.engine.states import Saved, Shape, Stored, as_tokens
from tests.test_engine_reuse import other_shapes

SHAPE = Shape("0123456789abcdef0123", 512, 4, "off", "f32")
STATE_BYTES = 1000
FILE_BYTES = 1500  # at most, of such a state


def saved(seed: int, shape: Shape = SHAPE, size_bytes: int = STATE_BYTES) -> Saved:
    rng = np.random.default_rng(seed)
    tokens = as_tokens(rng.integers(0, 500, 70).tolist())
    return Saved(shape, tokens, 69, rng.integers(0, 256, size_bytes, np.uint8).data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "prompts"


@pytest.fixture
def folder(path: Path) -> StateFolder:
    return StateFolder(path, 100_000, "build 1")


def write(folder: StateFolder, what: Saved) -> Stored:
    stored, _ = folder.write(what)
    assert stored is not None
    return stored


def heads(folder: StateFolder) -> list[Stored]:
    return folder.heads(SHAPE, folder.names(SHAPE))


def test_what_was_written_is_found_by_another_process_and_read(folder: StateFolder, path: Path) -> None:
    given = saved(1)
    write(folder, given)
    (found,) = heads(StateFolder(path, 100_000, "build 1"))
    assert (found.tokens.tolist(), found.held, found.shape) == (given.tokens.tolist(), given.held, SHAPE)
    assert folder.read(found) == given.state
    assert folder.sizes(SHAPE) == {found.name: found.size_bytes}


def test_nobody_else_can_read_it(folder: StateFolder, path: Path) -> None:
    name = write(folder, saved(1)).name
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / name).stat().st_mode) == 0o600


def spoil(path: Path, place: int | None, length: int | None) -> None:
    """Flips a bit at the place, or cuts to the length; negative counts from the end."""
    content = bytearray(path.read_bytes())
    if place is not None:
        content[place] ^= 4
    path.write_bytes(content[:length])


@pytest.mark.parametrize(
    ("place", "length"),
    [
        *((place, None) for place in (0, 9, 13, 17, 21, 29, 40, 120, 300)),
        *((None, n) for n in (0, 7, 30, 100, 400, -1)),
    ],
)
def test_a_spoilt_head_is_not_believed_and_deleted(
    folder: StateFolder, path: Path, caplog: pytest.LogCaptureFixture, place: int | None, length: int | None
) -> None:
    before = write(folder, saved(1))
    spoil(path / before.name, place, length)
    assert heads(folder) == []
    assert not (path / before.name).exists()
    assert "is not used and deleted" in caplog.text


@pytest.mark.parametrize(("place", "length"), [(-1, None), (-STATE_BYTES, None), (-500, None), (120, None), (None, -1)])
def test_a_state_spoilt_since_it_was_found_is_not_believed(
    folder: StateFolder, path: Path, caplog: pytest.LogCaptureFixture, place: int | None, length: int | None
) -> None:
    before = write(folder, saved(1))
    spoil(path / before.name, place, length)
    assert folder.read(before) is None
    assert not (path / before.name).exists()
    assert "is not used and deleted" in caplog.text


@pytest.mark.parametrize("other", other_shapes(SHAPE))
def test_a_state_of_another_shape_is_never_found_whatever_its_name(
    folder: StateFolder, path: Path, other: Shape
) -> None:
    name, foreign = write(folder, saved(1)).name, write(folder, saved(2, other)).name
    assert folder.names(other) == [foreign]
    shutil.copy(path / foreign, path / name)
    assert heads(folder) == []


def test_a_file_that_now_has_other_tokens_is_not_believed(folder: StateFolder, path: Path) -> None:
    one, other = write(folder, saved(1)), write(folder, saved(2))
    shutil.copy(path / other.name, path / one.name)
    assert folder.read(one) is None


def test_a_file_that_another_process_deleted_is_no_news(
    folder: StateFolder, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = write(folder, saved(1))
    (path / found.name).unlink()
    assert folder.read(found) is None
    assert caplog.text == ""


def test_states_of_another_build_and_unfinished_ones_are_swept_away(folder: StateFolder, path: Path) -> None:
    kept, older = write(folder, saved(1)), write(StateFolder(path, 100_000, "build 0"), saved(2))
    for name, age_s in (("old.part", 7200), ("new.part", 0), ("notes.txt", 7200)):
        (path / name).touch()
        os.utime(path / name, (time.time() - age_s,) * 2)
    assert folder.names(SHAPE) == [kept.name]
    folder.tidy()
    assert {file.name for file in path.iterdir()} == {kept.name, "new.part", "notes.txt"}, older.name


def test_the_state_used_longest_ago_leaves_first(path: Path) -> None:
    folder = StateFolder(path, 2 * FILE_BYTES, "build 1")
    first, second = write(folder, saved(1)), write(folder, saved(2))
    for age_s, stored in ((100, first), (50, second)):
        os.utime(path / stored.name, (time.time() - age_s,) * 2)
    assert folder.read(first) is not None
    third, left = folder.write(saved(3))
    assert third is not None
    assert left == [second.name]
    assert folder.sizes(SHAPE).keys() == {first.name, third.name}
    assert folder.used_bytes <= folder.limit_bytes


def test_a_limit_that_was_lowered_holds_at_once(folder: StateFolder, path: Path) -> None:
    for seed in range(3):
        write(folder, saved(seed))
    StateFolder(path, FILE_BYTES, "build 1").tidy()
    assert len(heads(folder)) == 1


def test_what_is_larger_than_the_limit_drives_nothing_out(path: Path) -> None:
    folder = StateFolder(path, FILE_BYTES, "build 1")
    write(folder, saved(1))
    assert folder.write(saved(2, size_bytes=2 * FILE_BYTES)) == (None, [])
    assert len(heads(folder)) == 1


def test_a_disk_that_takes_no_more_is_a_line_in_the_log(
    folder: StateFolder, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files fails a write in its middle, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert folder.write(saved(1)) == (None, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(path.iterdir()) == []
    assert "could not be saved" in caplog.text
    write(folder, saved(1))


def test_a_folder_that_cannot_be_made_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    folder = StateFolder(tmp_path / "file" / "prompts", 100_000, "build 1")
    assert folder.write(saved(1)) == (None, [])
    folder.tidy()
    assert heads(folder) == []
    assert "could not be saved" in caplog.text


def test_forgetting_a_model_leaves_the_others(folder: StateFolder) -> None:
    other = SHAPE._replace(digest="fedcba9876543210")
    for seed, shape in enumerate((SHAPE, SHAPE._replace(n_slots=1), other)):
        write(folder, saved(seed, shape))
    folder.forget(SHAPE.digest)
    assert [len(folder.names(shape)) for shape in (SHAPE, SHAPE._replace(n_slots=1), other)] == [0, 0, 1]


BUSY = """
import sys
from pathlib import Path
from rustllama.engine.state_folder import StateFolder
from tests.test_engine_state_folder import FILE_BYTES, STATE_BYTES, heads, saved
folder = StateFolder(Path(sys.argv[1]), 5 * FILE_BYTES, "build 1")
for number in range(100):
    given = saved(1000 * int(sys.argv[2]) + number)
    folder.write(given)
    for stored in heads(folder):
        state = folder.read(stored)
        assert state is None or len(state) == STATE_BYTES
"""


def test_processes_may_share_a_folder(folder: StateFolder, path: Path) -> None:
    """Three write, read and drive each other's states out: nobody fails, and nothing is ever found damaged."""
    command = [sys.executable, "-c", BUSY, str(path)]
    many = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True) for number in range(3)]
    assert [process.communicate()[1] for process in many] == [""] * 3
    assert all(folder.read(stored) is not None for stored in heads(folder))
    assert folder.used_bytes <= 7 * FILE_BYTES, "each process may be ahead by the file that it writes"
