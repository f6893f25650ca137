"""How far a load is: what llama.cpp tells, and what the system has read of a file that is mapped."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from rustllama.core import Loading
from rustllama.engine.loading import LoadGauge
from rustllama.engine.machine import mapped_bytes
from rustllama.engine.native import Model

STATM = Path("/proc/self/statm")


def test_a_load_that_has_not_begun_has_nothing_in_memory() -> None:
    assert LoadGauge(1000, lambda: 500).read() == Loading(0, 1000)


def test_a_file_that_is_read_counts_by_the_share_that_llama_cpp_tells() -> None:
    gauge = LoadGauge(1000, lambda: 0)
    gauge.start()
    gauge.tell(0.25)
    assert gauge.read() == Loading(250, 1000)


def test_a_file_that_is_mapped_counts_by_what_came_into_memory_since() -> None:
    mapped = iter([5000, 5300, 5900])
    gauge = LoadGauge(1000, mapped.__next__)
    gauge.start()
    assert [gauge.read(), gauge.read()] == [Loading(300, 1000), Loading(900, 1000)]


def test_a_load_never_goes_back_nor_beyond_its_end() -> None:
    mapped = iter([5000, 5700, 100, 9000])  # another model left meanwhile, and a larger one came
    gauge = LoadGauge(1000, mapped.__next__)
    gauge.start()
    assert [gauge.read().completed_bytes for _ in range(3)] == [700, 700, 1000]


@pytest.mark.parametrize("use_mmap", [True, False])
def test_llama_cpp_tells_the_share_up_to_the_whole(toys: dict[str, Path], use_mmap: bool) -> None:
    told: list[float] = []
    Model(str(toys["llama"]), use_mmap=use_mmap, tell=told.append).close()
    assert len(told) > 10
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert told == sorted(told)


@pytest.mark.skipif(not STATM.exists(), reason="only Linux tells")
def test_what_is_mapped_grows_by_the_pages_that_are_read(tmp_path: Path) -> None:
    size = 16 << 20
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    before = mapped_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert not any(pages[:: mmap.PAGESIZE])
        assert mapped_bytes() - before > size // 2
