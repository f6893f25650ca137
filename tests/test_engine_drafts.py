"""Drafts of what a sequence says next, and when they are worth computing."""

from __future__ import annotations

import pytest

from rustllama.engine.drafts import Drafter, expected, worthwhile


def follow(drafter: Drafter, *tokens: int) -> None:
    for token in tokens:
        drafter.tokens.append(token)
        drafter.follow()


def test_what_followed_the_last_tokens_before_is_drafted() -> None:
    assert Drafter([1, 2, 3, 4, 5, 6, 9, 1, 2, 3]).draft(3) == [4, 5, 6]


def test_the_latest_place_counts() -> None:
    assert Drafter([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).draft(1) == [5]


def test_what_repeats_itself_is_guessed_to_go_on() -> None:
    assert Drafter([1, 2, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]


def test_what_was_never_said_is_not_drafted() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6])
    assert drafter.draft(3) == []
    follow(drafter, 7, 8)
    assert drafter.draft(3) == []


def test_a_quotation_is_followed_to_its_end() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 7])
    follow(drafter, 1, 2, 3, 4, 5)
    assert drafter.draft(5) == [6, 7, 1, 2, 3]
    follow(drafter, 8)
    assert drafter.draft(5) == []


def test_trust_grows_with_drafts_that_come_true_and_falls_with_others() -> None:
    drafter = Drafter([*range(20), 0, 1, 2])
    follow(drafter, *range(3, 13))
    assert drafter.trust > 0.95
    follow(drafter, 99)
    assert drafter.trust < 0.7


def test_a_prompt_shorter_than_a_gram_is_no_trouble() -> None:
    drafter = Drafter([1])
    follow(drafter, 1, 1, 1, 1)
    assert drafter.draft(1) == [1]


@pytest.mark.parametrize(("trust", "count", "tokens"), [(0, 7, 0), (1, 7, 7), (0.5, 2, 0.75)])
def test_how_much_of_a_draft_comes_true(trust: float, count: int, tokens: float) -> None:
    assert expected(trust, count) == tokens


COSTS = ((1, 2.8), (3, 4.0), (7, 4.1), (15, 6.3))  # a 1B in Q8_0 on two cores


@pytest.mark.parametrize(("trust", "count"), [(0, 0), (0.8, 0), (0.9, 7), (1, 15)])
def test_drafts_are_computed_only_where_they_pay(trust: float, count: int) -> None:
    assert worthwhile(trust, COSTS) == count


def test_where_rows_are_free_little_trust_is_enough() -> None:
    assert worthwhile(0.2, ((1, 1.0), (3, 1.0), (7, 1.0))) == 7


def test_where_nothing_is_known_nothing_is_drafted() -> None:
    assert worthwhile(1, ()) == 0
