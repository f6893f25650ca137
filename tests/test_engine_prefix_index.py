"""The longest prefix among many, found without looking at all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustllama.engine.prefix_index import PrefixIndex
from rustllama.engine.states import Cuts, Shape, Stored, Tokens, as_tokens, common_prefix

SHAPE = Shape("digest", 512, 4, "off", "f32")
texts = st.lists(st.sampled_from([1, 2, 256]), min_size=1, max_size=8)


def stored(tokens: list[int]) -> Stored:
    """With a token more that was sampled and not computed."""
    return Stored(SHAPE, as_tokens([*tokens, 9]), len(tokens), "", 0)


def index(cuts: Cuts, *texts: list[int]) -> PrefixIndex[Stored]:
    made = PrefixIndex[Stored](cuts)
    for text in texts:
        made.add(stored(text))
    return made


def count(made: PrefixIndex[Stored], prompt: Tokens) -> int:
    found = made.longest(prompt)
    return 0 if found is None else found[1]


@pytest.mark.parametrize("cuts", [Cuts(), Cuts(recurrent=True)])
@given(known=st.lists(texts, max_size=12), prompt=texts)
def test_the_longest_usable_prefix_is_found(cuts: Cuts, known: list[list[int]], prompt: list[int]) -> None:
    tokens = as_tokens(prompt)
    usable = [cuts.usable(len(text), common_prefix(tokens, as_tokens(text))) for text in known]
    assert count(index(cuts, *known), tokens) == max(usable, default=0)


@given(known=st.lists(texts, max_size=12), prompt=texts)
def test_in_a_window_nothing_is_found_that_cannot_be_used(known: list[list[int]], prompt: list[int]) -> None:
    found = index(Cuts(window=4), *known).longest(as_tokens(prompt))
    if found is not None:
        entry, length = found
        assert length == len(prompt[: entry.held]) or entry.held < 4
        assert prompt[:length] == entry.tokens[:length].tolist()


@given(known=st.lists(texts, max_size=12), tokens=texts)
def test_all_prefixes_are_found_the_longest_first(known: list[list[int]], tokens: list[int]) -> None:
    found = [entry.held for entry in index(Cuts(), *known).prefixes(as_tokens(tokens))]
    assert found == sorted((len(text) for text in known if tokens[: len(text)] == text), reverse=True)


def test_what_was_discarded_is_not_found() -> None:
    made = index(Cuts(), [1, 2, 3])
    entry = next(iter(made))
    assert entry in made
    made.discard(entry)
    assert entry not in made
    assert made.longest(as_tokens([1, 2, 3])) is None


def test_a_longer_state_makes_those_superfluous_that_can_be_cut_from_it() -> None:
    new = stored([1, 2, 3])
    assert len(index(Cuts(), [1], [1, 2], [1, 2, 3, 4], [2]).superfluous(new)) == 2
    assert index(Cuts(recurrent=True), [1, 2]).superfluous(new) == []
    assert index(Cuts(), [1, 2, 3, 4]).covers(as_tokens([1, 2, 3]))
    assert not index(Cuts(recurrent=True), [1, 2, 3, 4]).covers(as_tokens([1, 2, 3]))
