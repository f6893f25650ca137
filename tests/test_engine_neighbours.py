"""Threads for a call, by what other programs leave of the cores."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rustllama.core import LoadOptions, MemoryPlan
from rustllama.engine import machine
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.engine import LlamaEngines
from rustllama.engine.machine import Cores
from rustllama.engine.native import Context
from rustllama.engine.neighbours import Neighbours
from rustllama.settings import Settings
from tests.test_engine_lane import N_CTX, SLOTS, answer, ask, record, until_idle


@dataclass
class Machine:
    """Its cores, and what they have computed: for us, and altogether."""

    count: int = 4
    busy_s: float = 1000.0
    own_s: float = 10.0
    yielding_s: float = 5.0
    now_s: float = 50.0
    running: int = 1  # at the moment: the one that asks

    def neighbours(self) -> Neighbours:
        return Neighbours(
            lambda: Cores(self.count, self.busy_s, self.running),
            lambda: self.own_s,
            lambda: self.yielding_s,
            lambda: self.now_s,
        )

    def pass_by(self, seconds: float, *, own: float, others: float, yielding: float = 0) -> None:
        """So long, with so many cores busy."""
        self.now_s += seconds
        self.own_s += own * seconds
        self.yielding_s += yielding * seconds
        self.busy_s += (own + others + yielding) * seconds


@pytest.mark.parametrize(
    ("own", "others", "threads"),
    [(4, 0, 4), (0, 0, 4), (3.6, 0.3, 4), (3, 1, 3), (2.5, 1.5, 2), (1, 3, 1), (0.2, 3.8, 1), (2, 1.4, 3)],
)
def test_a_call_has_as_many_threads_as_others_leave_cores(own: float, others: float, threads: int) -> None:
    machine = Machine()
    neighbours = machine.neighbours()
    machine.pass_by(1, own=own, others=others)
    assert neighbours.leave(4) == threads
    assert neighbours.leave(1) == 1


def test_two_servers_on_two_cores_come_to_one_thread_each_and_back_to_two() -> None:
    machine = Machine(count=2)
    neighbours = machine.neighbours()
    machine.pass_by(1, own=1, others=1)
    assert neighbours.leave(2) == 1
    machine.pass_by(1, own=1, others=1)
    assert neighbours.leave(2) == 1
    machine.pass_by(1, own=1, others=0.05)
    assert neighbours.leave(2) == 2


def test_after_a_rest_only_who_computes_now_takes_cores() -> None:
    machine = Machine()
    neighbours = machine.neighbours()
    machine.pass_by(60, own=0, others=3)
    assert neighbours.leave(4) == 4
    machine.running = 3
    machine.pass_by(60, own=0, others=3)
    assert neighbours.leave(4) == 2
    machine.pass_by(1, own=0, others=3)
    assert neighbours.leave(4) == 1


def test_children_that_give_way_leave_a_call_its_threads() -> None:
    machine = Machine(count=2)
    neighbours = machine.neighbours()
    machine.pass_by(1, own=1, others=0.25, yielding=0.75)
    assert neighbours.leave(2) == 2
    assert neighbours.free() == pytest.approx(1.75)
    machine.yielding_s = 0  # it has ended
    machine.pass_by(1, own=1, others=0.25)
    assert neighbours.leave(2) == 2


def test_nothing_is_judged_by_a_moment() -> None:
    machine = Machine()
    neighbours = machine.neighbours()
    machine.pass_by(0.1, own=0, others=4)
    assert neighbours.leave(4) == 4


def test_who_has_ended_takes_cores_no_longer_than_a_glance() -> None:
    machine = Machine()
    neighbours = machine.neighbours()
    machine.pass_by(1, own=1, others=3)
    assert neighbours.leave(4) == 1
    machine.pass_by(0.2, own=1, others=0)
    assert neighbours.leave(4) == 4


def test_where_the_system_tells_nothing_all_threads_compute() -> None:
    neighbours = Neighbours(lambda: None, now_s=iter(range(100)).__next__)
    assert [neighbours.leave(8) for _ in range(3)] == [8, 8, 8]
    assert neighbours.free() == math.inf


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/stat")
def test_other_programs_are_seen() -> None:
    cores = machine.cores()
    assert cores is not None
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores.count)]
    try:
        neighbours = Neighbours()
        time.sleep(1.5)
        assert neighbours.leave(cores.count) < max(2, cores.count)
        assert neighbours.busy > cores.count / 2
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.skipif(not list(Path("/proc/self/task").glob("*/children")), reason="the kernel does not tell children")
@pytest.mark.parametrize(("nice", "counts"), [(0, False), (5, True)])
def test_what_the_kernel_does_for_children_is_told_of_those_that_give_way(nice: int, counts: bool) -> None:
    program = f"import os; os.nice({nice}); print(flush=True)\nwhile True: os.urandom(1 << 20)"
    before_s = machine.yielding_children_s()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            fields = Path(f"/proc/{child.pid}/stat")
            while int(fields.read_text().rpartition(")")[2].split()[12]) < 5:
                time.sleep(0.01)
            told = machine.yielding_children_s() > before_s
        finally:
            child.kill()
    assert told is (counts or os.nice(0) > 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/stat")
def test_what_is_idle_or_gives_way_or_is_not_ours_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"  # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\n"
        "cpu0 100 5000 20 70000 800 3 4 60 100 0\n"
        "cpu1 900 5000 90 70000 800 9 9 60 0 0\n"
        "cpu2 200 5000 10 70000 800 1 2 60 0 0\nintr 1 2 3\n"
        "procs_running 7\nprocs_blocked 2\n"
    )
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    assert machine.cores() == Cores(2, 340 / os.sysconf("SC_CLK_TCK"), 7)
    stat.unlink()
    assert machine.cores() is None


def test_calls_have_fewer_threads_beside_others_but_for_what_must_be_the_same_bit_for_bit(
    toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(Context, "use", lambda _, n_threads: given.append(n_threads))
    engine = LlamaEngines(Settings(num_thread=2))(record(toys["llama"]), LoadOptions(), MemoryPlan(N_CTX, SLOTS, 0))
    busy = [False]
    monkeypatch.setattr(Neighbours, "leave", lambda _, most: 1 if busy[0] else most)
    engine._lanes[0]._scheduler.decode_cost = cost = DecodeCost()  # which wants nothing measured meanwhile
    requests = {"usual": ask(1), "reproducible": replace(ask(1), reproducible=True)}
    seen = {}
    for busy[0] in (False, True):
        for kind, request in requests.items():
            given.clear()
            assert answer(engine, request)
            until_idle(engine)
            seen[kind, busy[0]] = set(given)
    assert seen == {
        ("usual", False): {2},
        ("reproducible", False): {2},
        ("usual", True): {1},
        ("reproducible", True): {2},
    }
    known = list(cost.ms)
    answer(engine, requests["usual"])
    until_idle(engine)
    assert cost.ms == known, "what a call of fewer threads takes, others will not"
    engine.close()
