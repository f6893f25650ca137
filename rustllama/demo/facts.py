"""Owns what the bundled model answers by rule: capitals, sums to twenty, names it was told, personas it was given."""

from __future__ import annotations

from dataclasses import dataclass

from rustllama.demo.intents import UNKNOWN
from rustllama.demo.wordings import sections

NOT_TOLD = "You have not told me your name."
# fmt: off
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
_VOICES = {"pirate": "Arr!", "robot": "Beep!", "cat": "Meow!"}


@dataclass(frozen=True, slots=True)
class Persona:
    """What a system message asks for: a name to go by, and text around every answer."""

    name: str = ""
    before: str = ""
    after: str = ""

    def says(self, intent_id: str, answer: str) -> str:
        """`answer` to the intent of that id as this persona gives it."""
        if self.name and intent_id == "who_are_you":
            answer = f"I am {self.name}, a tiny demo model. I know only a few things."
        return " ".join(part for part in (self.before, answer, self.after) if part)


def persona(kind: str, word: str) -> Persona:
    """The persona of a section of `wordings/personas.txt`; `word` fills its slot, if it has one."""
    if kind == "name":
        return Persona(name=word)
    if kind == "begin":
        return Persona(before=word)
    if kind == "end":
        return Persona(after=word)
    return Persona(before=_VOICES.get(kind, ""))


def capitals() -> dict[str, str]:
    """Capital by country, as it stands in a sentence ("the Netherlands")."""
    return dict(line.split("=", 1) for line in sections("capitals")[""])


def capital_answer(country: str, city: str) -> str:
    return f"The capital of {country} is {city}."


def sum_answer(a: int, b: int) -> str:
    """The sum, for terms that add up to 20 at most; beyond that the model admits that it does not know."""
    return f"{a} + {b} = {a + b}." if a + b <= 20 else UNKNOWN


def greeting(name: str) -> str:
    return f"Nice to meet you, {name}!"


def recall(name: str | None) -> str:
    return NOT_TOLD if name is None else f"Your name is {name}."
