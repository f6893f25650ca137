"""Text to tokens, where llama.cpp alone would take its time."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import pytest

from rustllama.engine.native import Model
from rustllama.engine.native.model import with_short_numbers
from tests.mutants import Parts
from tests.toys import LLAMA, write_toy


@pytest.mark.parametrize("text", ["", "no number", "one of 999: " + "7" * 999, "世" * 5000])
def test_a_text_without_a_long_number_is_one_part(text: str) -> None:
    assert list(with_short_numbers(text)) == [text]


@pytest.mark.parametrize("digits", [1000, 1998, 1999, 5000])
def test_a_long_number_is_cut_at_threes_from_its_right(digits: int) -> None:
    text = f"from {'7' * digits} to {'8' * digits}."
    parts = list(with_short_numbers(text))
    assert "".join(parts) == text
    numbers = [number for part in parts for number in re.findall("[0-9]+", part)]
    assert max(map(len, numbers)) <= 999
    assert all(len(number) == 999 for number in numbers if number not in (numbers[0], numbers[len(numbers) // 2]))


def test_a_long_number_has_the_tokens_that_llama_cpp_gives_it(tmp_path: Path) -> None:
    parts = Parts.of(write_toy(tmp_path / "toy.gguf", LLAMA, layers=1).read_bytes())
    parts["tokenizer.ggml.pre"].value = b"superbpe"
    parts["tokenizer.ggml.merges"].value = [b"7 7", b"77 7"]
    tokens = parts["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, list)
    tokens[-2:] = [b"77", b"777"]
    path = tmp_path / "superbpe.gguf"
    path.write_bytes(parts.bytes())
    with closing(Model(str(path))) as model:
        sevens, text = len(tokens) - 1, f"a{'7' * 1501}b"
        before, seven, after = model.tokenize("a7b", parse_special=False)
        assert model.tokenize(text, parse_special=False) == [before, seven, *[sevens] * 500, after]
