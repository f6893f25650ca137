"""What decode calls cost, and the shapes that follow from it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustllama.engine.decode_cost import DecodeCost, Split

Q8_0 = [0, 32, 91, 112, 128, 172, 192, 213, 132, 170, 202, 190, 172, 220, 243, 230, 203]  # ms, like a 1B's on two cores
FLAT = [0] + [5.0] * 16  # like a GPU


@pytest.mark.parametrize(
    ("rows", "scratch", "split"),
    [
        (1, 15, Split((1,))),
        (2, 0, Split((1, 1))),
        (3, 13, Split((1, 1, 1))),
        (4, 0, Split((4,))),
        (7, 0, Split((7,))),
        (7, 1, Split((7,), 1)),
        (14, 2, Split((14,), 2)),
        (14, 1, Split((14,), 1)),
        (16, 0, Split((16,))),
    ],
)
def test_sequences_advance_in_the_cheapest_calls(rows: int, scratch: int, split: Split) -> None:
    assert DecodeCost(16, list(Q8_0)).split([0] * rows, scratch) == split


def test_where_more_rows_cost_nothing_there_is_one_call() -> None:
    cost = DecodeCost(16, list(FLAT))
    assert [cost.split([0] * rows, 3) for rows in range(1, 17)] == [Split((rows,)) for rows in range(1, 17)]


@given(
    ms=st.lists(st.floats(1, 1000), min_size=6, max_size=6),
    depths=st.lists(st.integers(0, 8000), min_size=1, max_size=5),
    cell_ms=st.floats(0, 0.01),
    scratch=st.integers(0, 5),
)
def test_no_other_split_is_much_cheaper(ms: list[float], depths: list[int], cell_ms: float, scratch: int) -> None:
    cost, rows = DecodeCost(6, [0, *ms], cell_ms=cell_ms), len(depths)
    found = cost.split(depths, scratch)
    assert sum(found.sizes) == rows
    assert found.scratch <= scratch

    def total(sizes: tuple[int, ...], pad: int) -> float:
        spent, start = 0.0, 0
        for place, size in enumerate(sizes, 1):
            count = size + pad * (place == len(sizes))
            deepest = max(depths[start : start + size])
            spent += cost.ms[count] + count * (deepest - deepest % 256) * cell_ms
            start += size
        return spent

    ways = [
        total(sizes, pad)
        for count in range(1, rows + 1)
        for sizes in itertools.product(range(1, rows + 1), repeat=count)
        if sum(sizes) == rows
        for pad in range(min(scratch, 6 - sizes[-1]) + 1)
    ]
    assert total(found.sizes, found.scratch) <= min(ways) / 0.95 + 1e-6


def test_a_deep_sequence_advances_alone_where_the_others_would_pay_for_its_depth() -> None:
    """As measured of plain attention on an Intel Xeon: 213 ms together, 47 and 34 apart."""
    cost = DecodeCost(8, [0, 12, 17, 22, 27, 32, 36, 40, 44])
    assert cost.split([300] * 7 + [6000], 0) == Split((8,)), "before it was seen"
    cost.observe(8, depth=6000, ms=213)
    assert cost.split([300] * 7 + [6000], 0) == Split((7, 1))
    assert cost.split([300, 6000] + [300] * 6, 0) == Split((1, 1, 6)), "only neighbours share a call"
    assert cost.split([6000] * 8, 0) == Split((8,)), "they are equally deep"
    assert cost.split([100] * 7 + [500], 0) == Split((8,)), "not worth a call"


def test_what_depth_costs_is_learned_from_calls_of_any_shape() -> None:
    cost = DecodeCost(8, [0, 12, 17, 22, 0, 32, 36, 40, 44])
    cost.observe(4, depth=6000, ms=1000)
    assert not cost.cell_ms, "what its rows cost is not known"
    for rows in (8, 1, 7, 2) * 5:
        cost.observe(rows, depth=2048, ms=cost.ms[rows] + rows * 2048 * 0.002)
    assert cost.cell_ms == pytest.approx(0.002)
    for rows in (8, 1) * 20:
        cost.observe(rows, depth=2048, ms=cost.ms[rows])
    assert cost.cell_ms < 0.0005, "a disturbance is forgotten"
    assert cost.ms[8] == 44


def test_what_is_not_known_is_one_call() -> None:
    assert DecodeCost(8, [0, 1, 0, 0]).split([0] * 3, 0) == Split((3,))
    assert DecodeCost().split([0] * 5, 3) == Split((5,))


def test_a_shape_that_turns_out_dear_is_left() -> None:
    cost = DecodeCost(2, [0, 10, 30])
    assert cost.split([0, 0], 0) == Split((1, 1))
    for _ in range(100):
        cost.observe(1, depth=10, ms=20)
    assert cost.split([0, 0], 0) == Split((2,))


def test_a_deep_call_tells_nothing_about_its_rows() -> None:
    cost = DecodeCost(2, [0, 10, 30])
    cost.observe(1, depth=5000, ms=500)
    assert cost.ms[1] == 10


def test_every_size_is_measured_until_all_are_known() -> None:
    cost = DecodeCost(5)
    seen = []
    while wanted := cost.wanted:
        rows = wanted[0]
        seen.append(rows)
        cost.measured(rows, 1000.0 * rows + len(seen))
    assert seen == [1, 2, 4, 8, 16, 3, 5] * 3, "calls with drafts may have more rows than there are slots"
    assert cost.ms[:6] == [0, 1001, 2002, 3006, 4003, 5007], "the fastest of three"


def test_what_no_other_try_confirms_is_not_believed_but_measured_again() -> None:
    cost = DecodeCost(4, may_draft=False)
    disturbed = iter([1000.0, 700.0, 900.0])
    seen = []
    while wanted := cost.wanted:
        rows = wanted[0]
        assert not cost.ms[2]
        seen.append(rows)
        cost.measured(rows, next(disturbed, 200.0) if rows == 2 else 100.0 * rows)
    assert seen.count(2) == 5, "three that were disturbed, and two that agree"
    assert cost.ms[2] == 200


def test_where_no_two_tries_agree_the_fastest_of_eight_is_believed() -> None:
    cost = DecodeCost(2, may_draft=False)
    tries = 0
    while wanted := cost.wanted:
        rows = wanted[0]
        tries += rows == 2
        cost.measured(rows, 1000.0 - 100 * tries)
    assert tries == 8
    assert cost.ms[2] == 200


def test_calls_that_serve_somebody_are_measures_too() -> None:
    cost = DecodeCost(4)
    cost.observe(3, depth=10, ms=90)
    assert not cost.ms[3], "one alone may have been disturbed"
    cost.observe(3, depth=10, ms=60)
    assert not cost.ms[3]
    cost.observe(3, depth=10, ms=62)
    assert cost.ms[3] == 60


def test_what_a_disturbance_made_dear_is_soon_believed_to_be_cheap() -> None:
    cost = DecodeCost(2, [0, 10, 300])
    for _ in range(6):
        cost.observe(2, depth=10, ms=15)
    assert cost.ms[2] < 20
    cost.observe(2, depth=10, ms=300)
    assert cost.ms[2] < 35, "one that is disturbed later makes it dear no more"


def test_drafts_cost_what_the_rows_cost_that_they_add() -> None:
    cost = DecodeCost(16, list(Q8_0))
    assert cost.of_drafts(1) == ((1, 91 / 32), (3, 4.0), (7, 132 / 32), (15, 203 / 32))
    assert cost.of_drafts(2) == ((1, 128 / 91), (3, 132 / 91), (7, 203 / 91))
    assert cost.of_drafts(7, scratch=1) == ((1, 243 / 132),)
    assert DecodeCost(16).of_drafts(1) == ()


def test_decode_calls_that_were_not_measured_tell_nothing() -> None:
    assert DecodeCost().of_a_row(8, than=4) is None
    assert DecodeCost(8, [0, 35, 60, 80, 100]).of_a_row(8, than=4) is None


def test_what_was_known_is_measured_once_more() -> None:
    cost = DecodeCost(1, [0, 10, 20, 0, 40, 0, 0, 0, 80, *[0] * 7, 160])
    seen = []
    while wanted := cost.wanted:
        rows = wanted[0]
        seen.append(rows)
        cost.measured(rows, 5.0 if rows == 16 else 200.0)
    assert seen == [1, 2, 4, 8, 16, 16], "what comes out faster needs another one that agrees"
    assert [cost.ms[rows] for rows in (1, 2, 4, 8, 16)] == [10, 20, 40, 80, 5], "a disturbed measure is not for ever"


def test_sizes_that_only_drafts_would_have_are_measured_for_drafts_only() -> None:
    assert DecodeCost(1, may_draft=False).wanted == [], "there is nothing to choose"
    cost = DecodeCost(3, may_draft=False)
    seen = set()
    while wanted := cost.wanted:
        rows = wanted[0]
        seen.add(rows)
        cost.measured(rows, 1.0)
    assert seen == {1, 2, 3}
    assert cost.of_drafts(1) == ()
