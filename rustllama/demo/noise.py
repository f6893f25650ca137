"""Owns how a plain wording becomes what somebody might type: other openings, frames, synonyms, slips of a finger."""

from __future__ import annotations

import re
from random import Random

from rustllama.demo.wordings import fill, sections
from rustllama.demo.words import Words

_HOW = re.compile(r"how (?:do|can) I (.+)|how to (.+)")
_WHY = re.compile(r"why ((?:is|are|do|does|isn't|can't|don't) .+)")
_WHAT = re.compile(r"what(?: is|'s) ((?:a|an|the) .+)")
_QUESTION = re.compile(r"(how|what|why|which|where|who|when|is|are|can|does|do|will|am|may|did|has|could)\b", re.I)


class Noise:
    """Turns wordings into typed text. Draws only from the random source it is given, so a seed repeats it."""

    def __init__(self, words: Words, chatter: float = 0.0) -> None:
        """`chatter` is the share of texts that get a sentence about something else before or behind them."""
        self._words = words
        self._chatter = chatter
        frames = sections("frames")
        self._sentences = frames["chatter"]
        self._restyles = (
            (_HOW, frames["how"], "do"),
            (_WHY, frames["why"], "is"),
            (_WHAT, frames["what"], "noun"),
        )
        self._before = frames["before"]
        self._after = frames["after"]
        self._usage_before = frames["before"] + frames["usage_before"] * 3
        self._usage_after = frames["after"] + frames["usage_after"] * 3
        self._synonyms: dict[str, list[str]] = {}
        for line in sections("synonyms")[""]:
            group = line.split("|")
            for word in group:
                if " " not in word:
                    self._synonyms.setdefault(word, []).extend(other for other in group if other != word)

    def typed(self, text: str, rng: Random, *, usage: bool = False) -> str:
        """`text` as somebody might type it; `usage` allows frames that speak of rustllama."""
        if rng.random() < 0.2 - self._chatter / 4:
            return self._spelled(text, rng)
        if rng.random() < 0.4:
            text = self._restyled(text, rng)
        if rng.random() < 0.2:
            text = self._reworded(text, rng, share=0.2)
        if rng.random() < 0.08:
            text = _dropped(text, rng)
        return self._spelled(self._framed(text, rng, usage), rng)

    def lightly(self, text: str, rng: Random) -> str:
        """`text` in a frame, with other punctuation and case, but every word as it was: for names and numbers."""
        if rng.random() < 0.4 + self._chatter / 4:
            text = self._framed(text, rng, usage=False)
        text = _punctuated(text, rng)
        return text[:1].upper() + text[1:] if rng.random() < 0.6 else text

    def _restyled(self, text: str, rng: Random) -> str:
        for pattern, styles, slot in self._restyles:
            match = pattern.fullmatch(text)
            if match:
                rest = next(group for group in match.groups() if group)
                return rng.choice(styles).replace(f"<{slot}>", rest)
        return text

    def _chatted(self, text: str, rng: Random) -> str:
        sentence = self._slots(rng.choice(self._sentences), rng)
        if rng.random() < 0.5:
            return sentence + rng.choice((": ", ". ", ", ", " - ", "! ", "; ")) + text
        sentence = sentence + rng.choice((".", ".", ".", "", "!"))
        return text + rng.choice(("? ", ". ", " ", " ", ", ", "! ", " - ")) + sentence

    def _framed(self, text: str, rng: Random, usage: bool) -> str:
        if self._chatter and rng.random() < self._chatter:
            return self._chatted(text, rng)
        if rng.random() < 0.35:
            text = self._slots(rng.choice(self._usage_before if usage else self._before), rng) + text
        if rng.random() < 0.25:
            text += self._slots(rng.choice(self._usage_after if usage else self._after), rng)
        return text

    def _slots(self, frame: str, rng: Random) -> str:
        return fill(frame, lambda slot: self._words.draw(slot, rng))

    def _reworded(self, text: str, rng: Random, share: float) -> str:
        words = text.split(" ")
        for i, word in enumerate(words):
            if word in self._synonyms and rng.random() < share:
                words[i] = rng.choice(self._synonyms[word])
        return " ".join(words)

    def _spelled(self, text: str, rng: Random) -> str:
        if rng.random() < 0.15:
            text = text.replace("'", "")
        if rng.random() < 0.05:
            text = _mistyped(text, rng)
        text = _punctuated(text, rng)
        style = rng.random()
        if style < 0.55:
            return text[:1].upper() + text[1:]
        if style < 0.75:
            return text.lower()
        return text.upper() if style > 0.98 else text


def _punctuated(text: str, rng: Random) -> str:
    if text[-1:] in "!?.:)":
        return text
    asks = _QUESTION.match(text) is not None
    draw = rng.random()
    if draw < (0.6 if asks else 0.25):
        return text + "?"
    if draw > 0.92:
        return text + rng.choice((".", "!", "??", " ?", "?!", "."))
    return text


def _dropped(text: str, rng: Random) -> str:
    words = text.split(" ")
    if len(words) < 4:
        return text
    return " ".join(word for word in words if rng.random() > 0.12) or text


def _mistyped(text: str, rng: Random) -> str:
    """One or two slips: a letter left out, doubled, swapped with the next, or replaced."""
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(text))
        if not text[i].isalpha():
            continue
        slip = rng.randrange(4)
        if slip == 0 and len(text) > 3:
            text = text[:i] + text[i + 1 :]
        elif slip == 1:
            text = text[:i] + text[i] + text[i:]
        elif slip == 2:
            text = text[:i] + text[i + 1 : i + 2] + text[i] + text[i + 2 :]
        else:
            text = text[:i] + rng.choice("etaoinshrdlcum") + text[i + 1 :]
    return text
