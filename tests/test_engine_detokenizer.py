"""Text out of tokens: whole characters, and never a piece of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustllama.engine.detokenizer import Detokenizer


def run(pieces: list[bytes], *stop: str) -> list[str]:
    detokenizer = Detokenizer(stop)
    seen = []
    for piece in pieces:
        seen.append(detokenizer.push(piece))
        if detokenizer.stopped:
            break
    return [*seen, detokenizer.flush()]


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    assert run([b"\xf0\x9f", b"\xa6", b"\x99!"]) == ["", "", "🦙!", ""]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    assert run([b"a\xf0\x9f"]) == ["a", "�"]


def test_a_stop_string_across_tokens_never_leaks_a_piece() -> None:
    assert run([b"Hi ", b"EN", b"D more"], "END") == ["Hi ", "", "", ""]


def test_text_that_only_began_like_a_stop_string_is_given_out() -> None:
    assert run([b"a EN", b"GINS"], "END") == ["a ", "ENGINS", ""]


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert run([b"one, two. three"], "three", ",") == ["one", ""]


def test_what_is_held_back_is_given_out_at_the_end() -> None:
    assert run([b"the EN"], "END") == ["the ", "EN"]


@pytest.mark.parametrize("stop", ["aab", "aaab", "abab"])
def test_a_stop_string_that_overlaps_itself_is_found(stop: str) -> None:
    text = "aaaaababab"
    assert "".join(run([c.encode() for c in text], stop)) == text[: text.find(stop)]


@given(st.text(alphabet="abé🦙", max_size=40), st.text(alphabet="abé🦙", min_size=1, max_size=3), st.data())
def test_any_split_gives_the_text_before_the_stop_string(text: str, stop: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    expected = text.split(stop, maxsplit=1)[0]
    assert "".join(run(pieces, stop)) == expected
