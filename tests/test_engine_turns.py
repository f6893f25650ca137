"""Models that are busy at once share the native thread's time, and not its turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest

from rustllama.core import LoadOptions, MemoryPlan
from rustllama.engine.engine import LlamaEngine, LlamaEngines
from rustllama.engine.lane import LaneStream
from rustllama.engine.turns import SHORTEST_TURN_NS, Claim, Share, Turns
from rustllama.errors import Cancelled
from rustllama.settings import Settings
from tests.test_engine_lane import ask, record, until_idle
from tests.toys import LLAMA, write_toy

MS = 1_000_000


@dataclass
class Player:
    """A lane in virtual time, that computes whenever it may."""

    step_ms: int
    claim: Claim
    waits_ms: list[int] = field(default_factory=list)
    asked_ms: int = 0
    used_ms: int = 0


class Stage:
    """Plays lanes against each other as `Lane._loop` does, without a thread or a clock."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.now_ms = 0
        self.granted: list[Claim] = []
        self.busy: list[Player] = []

    def enter(self, step_ms: int, share: Share | None = None) -> Player:
        claim = Claim(share or Share(self.turns), lambda: self.granted.append(claim))
        player = Player(step_ms, claim)
        self.come_back(player)
        return player

    def come_back(self, player: Player) -> None:
        self.busy.append(player)
        self._ask(player)

    def go(self, player: Player) -> None:
        self.busy.remove(player)
        self.turns.leave(player.claim, self.now_ms * MS)

    def play(self, duration_ms: int) -> None:
        end_ms = self.now_ms + duration_ms
        while self.now_ms < end_ms:
            (player,) = [player for player in self.busy if player.claim is self.turns.holder]
            player.waits_ms.append(self.now_ms - player.asked_ms)
            self._take_turn(player, end_ms)

    def _take_turn(self, player: Player, end_ms: int) -> None:
        began_ms = self.now_ms
        self.now_ms += player.step_ms
        while not self.turns.over(self.now_ms * MS) and self.now_ms < end_ms:
            self.now_ms += player.step_ms
        player.used_ms += self.now_ms - began_ms
        self.turns.leave(player.claim, self.now_ms * MS)
        self._ask(player)

    def _ask(self, player: Player) -> None:
        player.asked_ms = self.now_ms
        self.turns.ask(player.claim, self.now_ms * MS)


def parts(*players: Player) -> list[float]:
    used = [player.claim.share.used_ns for player in players]
    return [one / sum(used) for one in used]


@pytest.mark.parametrize("steps_ms", [(1, 1), (10, 200), (200, 10), (90, 100), (7, 13), (1, 30, 200), (150, 20, 20)])
def test_models_get_equal_times_however_long_their_steps_are(steps_ms: tuple[int, ...]) -> None:
    stage = Stage()
    players = [stage.enter(step_ms) for step_ms in steps_ms]
    stage.play(10_000)
    assert parts(*players) == pytest.approx([1 / len(players)] * len(players), abs=0.03)


def test_a_small_model_takes_many_steps_in_a_turn_and_a_big_one_one() -> None:
    stage = Stage()
    small, big = stage.enter(10), stage.enter(200)
    stage.play(10_000)
    assert len(small.waits_ms) == pytest.approx(len(big.waits_ms), abs=1)
    assert max(*small.waits_ms, *big.waits_ms) <= 200


def test_two_busy_models_wait_no_longer_than_both_take_for_a_step() -> None:
    stage = Stage()
    one, other = stage.enter(100), stage.enter(100)
    stage.play(10_000)
    assert {*one.waits_ms, *other.waits_ms} == {0, 100}


def test_a_turn_of_short_steps_is_worth_its_handing_over() -> None:
    stage = Stage()
    players = [stage.enter(1), stage.enter(1)]
    stage.play(1_000)
    assert sum(len(player.waits_ms) for player in players) == 1_000 * MS // SHORTEST_TURN_NS


def test_a_turn_has_no_end_while_nobody_waits() -> None:
    stage = Stage()
    player = stage.enter(10)
    stage.play(10_000)
    assert len(player.waits_ms) == 1


def test_who_was_idle_has_nothing_saved_up() -> None:
    stage = Stage()
    one, other = stage.enter(10), stage.enter(10)
    stage.play(100)
    stage.go(other)
    stage.play(5_000)
    before = one.claim.share.used_ns
    stage.come_back(other)
    stage.play(1_000)
    assert one.claim.share.used_ns - before == pytest.approx(500 * MS, abs=20 * MS)


def test_a_newcomer_waits_for_one_step_and_owes_nothing_for_the_past() -> None:
    stage = Stage()
    old = stage.enter(100)
    stage.play(5_000)
    new = stage.enter(10)
    stage.play(1_000)
    assert old.claim.share.used_ns == pytest.approx(5_500 * MS, abs=100 * MS)
    assert max(new.waits_ms) <= 100


def test_going_idle_for_a_moment_pays_no_debt() -> None:
    stage = Stage()
    greedy, other = stage.enter(300), stage.enter(10)
    for _ in range(10):
        stage.play(600)
        stage.go(greedy)
        stage.come_back(greedy)
    assert parts(greedy, other) == pytest.approx([0.5, 0.5], abs=0.06)


@pytest.mark.parametrize("steps_ms", [(10, 10, 10), (10, 200, 50)])
def test_the_lanes_of_a_model_divide_its_share(steps_ms: tuple[int, int, int]) -> None:
    stage = Stage()
    usual = stage.enter(steps_ms[0])
    large = stage.enter(steps_ms[1], usual.claim.share)
    other = stage.enter(steps_ms[2])
    stage.play(20_000)
    assert parts(usual, other) == pytest.approx([0.5, 0.5], abs=0.03)
    assert [usual.used_ms, large.used_ms] == pytest.approx([5_000, 5_000], abs=200)


def test_who_gives_up_waiting_is_passed_over_and_keeps_nobody_else() -> None:
    stage = Stage()
    holder, gone, last = stage.enter(10), stage.enter(10), stage.enter(10)
    stage.go(gone)
    stage.go(holder)
    assert stage.granted == [holder.claim, last.claim]
    stage.go(last)
    assert (stage.turns.holder, stage.turns.waiting) == (None, [])
    assert gone.claim.share.busy == 0


@pytest.fixture
def two(toys: dict[str, Path], tmp_path: Path) -> Iterator[tuple[LlamaEngine, LlamaEngine]]:
    """A small and a big model of one server, with room for long answers; they are closed while they compute."""
    wide = write_toy(tmp_path / "wide.gguf", LLAMA, width=512, layers=8, feed_forward=2048, heads=8)
    engines = LlamaEngines(Settings(flash_attention="off", num_thread=1))
    small, big = (engines(record(path), LoadOptions(), MemoryPlan(2048, 2, 0)) for path in (toys["llama"], wide))
    yield small, big
    for engine in (small, big):
        engine.close()


def begun(engine: LlamaEngine, number: int) -> LaneStream:
    """An answer as long as its slot, which has its first token."""
    stream = engine.submit(ask(number, max_tokens=None, num_ctx=2048))
    next(iter(stream))
    return stream


def used_ns(*engines: LlamaEngine) -> list[int]:
    return [engine._share.used_ns for engine in engines]


def test_a_small_and_a_big_model_get_half_of_the_time_each(two: tuple[LlamaEngine, LlamaEngine]) -> None:
    answers = [begun(engine, number) for number in range(2) for engine in two]
    before = used_ns(*two)
    deque(islice(answers[0], 1_000), maxlen=0)
    used = [after - start for after, start in zip(used_ns(*two), before, strict=True)]
    assert used[0] / sum(used) == pytest.approx(0.5, abs=0.1)
    assert [engine.state().running for engine in two] == [2, 2], "both were busy all the time"


def test_who_waits_for_its_turn_can_be_cancelled_and_checked(two: tuple[LlamaEngine, LlamaEngine]) -> None:
    small, big = two
    answers = begun(small, 1), begun(big, 2)
    answers[0].cancel()
    with pytest.raises(Cancelled):
        deque(answers[0], maxlen=0)
    until_idle(small)
    small.check_integrity()
    assert big.state().running == 1
