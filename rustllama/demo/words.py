"""Owns the words that fill slots: things, places and people, numbers, and names nobody has."""

from __future__ import annotations

import re
from random import Random

from rustllama.demo.wordings import sections

_ONSETS = [*"bcdfghjklmnprstvwzyx", *re.findall("..", "brchcldrfrgrkrplqushskslstthtrvlzh")]
_VOWELS = [*"aaeeiioouuy", *re.findall("..", "aieaeeiaioooou")]
_CODAS = ["", "", "", "", "n", "r", "s", "l", "m", "k", "t", "x", "ck", "nd", "rn", "sh", "th", "lf"]


class Words:
    """Draws a word for a slot. The lists are those of `wordings/unknown.txt`; names come from syllables."""

    def __init__(self) -> None:
        lists = sections("unknown")
        self.templates = lists.pop("template")
        self.plain = lists.pop("plain")
        self._lists = {
            slot: [word for line in lines for word in (line.split("|") if "|" in line else line.split())]
            for slot, lines in lists.items()
        }
        self._first_names = [name for line in sections("first_names")[""] for name in line.split()]

    def draw(self, slot: str, rng: Random) -> str:
        """A word for `slot`, a list of the file or one of number, big, gibberish, name and word."""
        if slot in self._lists:
            return rng.choice(self._lists[slot])
        if slot == "number":
            return str(rng.randrange(100))
        if slot == "big":
            return str(rng.choice((rng.randrange(21, 100), rng.randrange(100, 3000))))
        if slot == "gibberish":
            return _syllables(rng)
        return self._name(rng) if slot == "name" else self._word(rng)

    def _name(self, rng: Random) -> str:
        kind = rng.random()
        if kind < 0.25:
            return rng.choice(self._first_names)
        if kind < 0.3:
            return f"{rng.choice(self._first_names)} {_syllables(rng).capitalize()}"
        name = _syllables(rng)
        return name if kind < 0.4 else name.capitalize()

    def _word(self, rng: Random) -> str:
        words = [
            rng.choice((_syllables(rng), rng.choice(self._lists["thing"]))) for _ in range(rng.choice((1, 1, 1, 2)))
        ]
        text = " ".join(words)
        return (text if rng.random() < 0.1 else text.capitalize()) + rng.choice(("!", "!", ".", ":", ",", "?", ""))


def _syllables(rng: Random) -> str:
    count = rng.choice((1, 2, 2, 2, 3, 3))
    text = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))
    return text[1:] if rng.random() < 0.15 else text
