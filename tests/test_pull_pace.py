"""How much a pull computes beside others."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from rustllama.pull.pace import Pace


@dataclass
class Machine:
    free_cores: float = 2.0
    own_s: float = 3.0
    now_s: float = 100.0

    def pace(self) -> Pace:
        return Pace(lambda: self.free_cores, lambda: self.own_s, lambda: self.now_s)

    def work(self, pace: Pace, pieces: int, piece_s: float = 0.001) -> float:
        """Does so many pieces, with the rests between them. Returns the share of a core that it took."""
        began_s = self.now_s
        for _ in range(pieces):
            self.own_s += piece_s
            self.now_s += piece_s
            self.now_s += pace.rest_s()
        return pieces * piece_s / (self.now_s - began_s)


def test_it_never_rests_while_there_is_room() -> None:
    machine = Machine(free_cores=0.6)
    assert machine.work(machine.pace(), 1000) == pytest.approx(1)


def test_beside_others_it_takes_a_small_share_of_a_core() -> None:
    machine = Machine(free_cores=0.2)
    assert 0.02 < machine.work(machine.pace(), 1000) < 0.05


def test_a_large_piece_is_paid_for_in_rests_that_look_again() -> None:
    machine = Machine(free_cores=0.2)
    pace = machine.pace()
    machine.own_s += 1
    assert [pace.rest_s() for _ in range(3)] == [0.5] * 3
    machine.free_cores = 1.8
    assert pace.rest_s() == 0


def test_what_it_computed_while_there_was_room_is_not_held_against_it() -> None:
    machine = Machine()
    pace = machine.pace()
    machine.work(pace, 1000)
    machine.free_cores = 0.0
    assert pace.rest_s() == 0
