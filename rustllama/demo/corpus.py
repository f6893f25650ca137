"""Owns the dialogues the bundled model learns from: which questions are mixed, and what is answered to each.

Everything is drawn from one random source, so a seed repeats the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from rustllama.demo import facts
from rustllama.demo.facts import Persona
from rustllama.demo.intents import INTENTS, SMALL_TALK, UNKNOWN
from rustllama.demo.noise import Noise
from rustllama.demo.wordings import expand, fill, intent_wordings, sections
from rustllama.demo.words import Words

NO_PERSONA = Persona()
_SMALL_TALK = frozenset(intent.id for intent in SMALL_TALK)
_GENERAL = frozenset(("sky_blue", "sea_salty", "leaves_fall", "grass_green", "moon_phases", "moon_distance"))


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(slots=True)
class Talk:
    """A dialogue in the making: its messages so far, who answers, and the name the user gave."""

    persona: Persona = NO_PERSONA
    name: str | None = None
    messages: list[Message] = field(default_factory=list)

    def add(self, question: str, answer: str, *, intent_id: str = "") -> None:
        """One turn; the persona has its say in the answer."""
        self.messages.append(Message("user", question))
        self.messages.append(Message("assistant", self.persona.says(intent_id, answer)))


class Corpus:
    """Draws dialogues. `chatter` is the share of questions that stand beside a sentence about something else."""

    def __init__(self, seed: int, *, chatter: float = 0.0) -> None:
        self._rng = Random(seed)
        self._words = Words()
        self._noise = Noise(self._words, chatter)
        self._wordings = intent_wordings()
        self._answers = {intent.id: intent.answer for intent in INTENTS}
        self._ids = list(self._answers)
        self._capitals = list(facts.capitals().items())
        self._capital_questions = sections("capital_questions")[""]
        self._sum_questions = sections("sum_questions")[""]
        self._name_lines = sections("names")
        self._personas = sections("personas")
        self._kinds: tuple[tuple[float, Callable[[Talk], None]], ...] = (
            (0.61, self._intent),
            (0.20, self._unknown),
            (0.06, self._capital),
            (0.07, self._sum),
            (0.06, self._name),
        )

    def dialogue(self) -> list[Message]:
        """The next dialogue: one to four turns, seldom up to ten, now and then under a system message."""
        talk = self._opened(system_share=0.12)
        kind = self._rng.random()
        if kind < 0.05:
            self._remembering(talk, self._rng.choice((0, 1, 1, 2, 2, 3)))
            return talk.messages
        turns = 1 if kind < 0.94 else self._rng.randint(2, 4) if kind < 0.998 else self._rng.randint(5, 10)
        for _ in range(turns):
            self._turn(talk)
        return talk.messages

    def exercise(self) -> list[Message]:
        """A short dialogue that can be answered only by copying, or by adding: what is learnt slowest."""
        kind = self._rng.random()
        talk = self._opened(system_share=1 if kind > 0.7 else 0)
        if kind < 0.4:
            self._echo(talk)
        elif kind < 0.6:
            self._remembering(talk, 0)
        elif talk.persona.name:
            self._intent(talk, "who_are_you")
        else:
            self._sum(talk)
        return talk.messages

    def _opened(self, system_share: float) -> Talk:
        talk = Talk()
        if self._rng.random() < system_share:
            weights = [("neutral", 4), ("name", 6), ("begin", 4), ("end", 2), ("pirate", 2), ("robot", 2), ("cat", 2)]
            kind = self._rng.choices([kind for kind, _ in weights], [weight for _, weight in weights])[0]
            word = self._words.draw("name" if kind == "name" else "word", self._rng)
            talk.persona = facts.persona(kind, word)
            line = fill(
                self._rng.choice(self._personas[kind]),
                lambda slot: word if slot in ("name", "word") else self._words.draw(slot, self._rng),
            )
            talk.messages.append(Message("system", line))
        return talk

    def _turn(self, talk: Talk) -> None:
        if talk.persona.name and self._rng.random() < 0.5:
            self._intent(talk, "who_are_you")
            return
        draw = self._rng.random()
        for share, kind in self._kinds:
            draw -= share
            if draw < 0:
                kind(talk)
                return
        self._intent(talk)

    def _remembering(self, talk: Talk, turns_between: int) -> None:
        """The user gives a name, speaks of other things, and asks for it."""
        self._tell(talk)
        for _ in range(turns_between):
            self._turn(talk)
        self._ask(talk)

    def _intent(self, talk: Talk, intent_id: str = "") -> None:
        intent_id = intent_id or self._rng.choice(self._ids)
        text = expand(self._rng.choice(self._wordings[intent_id]), self._rng)
        usage = intent_id not in _SMALL_TALK and intent_id not in _GENERAL
        question = self._noise.typed(text, self._rng, usage=usage)
        talk.add(question, self._answers[intent_id], intent_id=intent_id)

    def _unknown(self, talk: Talk) -> None:
        """A question on another topic: as it was written down, or a template filled with any words."""
        lines = self._words.plain if self._rng.random() < 0.4 else self._words.templates
        text = fill(self._rng.choice(lines), lambda slot: self._words.draw(slot, self._rng))
        talk.add(self._noise.typed(text, self._rng), UNKNOWN)

    def _capital(self, talk: Talk) -> None:
        country, city = self._rng.choice(self._capitals)
        named = country.removeprefix("the ") if self._rng.random() < 0.15 else country
        text = fill(self._rng.choice(self._capital_questions), lambda slot: named)
        light = self._rng.random() < 0.5
        question = self._noise.lightly(text, self._rng) if light else self._noise.typed(text, self._rng)
        talk.add(question, facts.capital_answer(country, city))

    def _sum(self, talk: Talk) -> None:
        a = self._rng.randint(0, 20)
        b = self._rng.randint(0, 20 - a) if self._rng.random() < 0.9 else self._rng.randint(0, 20)
        spelled = self._rng.random() < 0.15
        a_text, b_text = (facts.NUMBER_WORDS[n] if spelled else str(n) for n in (a, b))
        line = self._rng.choice(self._sum_questions)
        text = line.replace("<a>", a_text).replace("<b>", b_text)
        talk.add(self._noise.lightly(text, self._rng), facts.sum_answer(a, b))

    def _name(self, talk: Talk) -> None:
        if self._rng.random() < (0.6 if talk.name is None else 0.2):
            self._tell(talk)
        else:
            self._ask(talk)

    def _tell(self, talk: Talk) -> None:
        talk.name = self._words.draw("name", self._rng)
        line = self._rng.choice(self._name_lines["tell"])
        name = talk.name
        text = fill(line, lambda slot: name)
        talk.add(self._noise.lightly(text, self._rng), facts.greeting(name))

    def _echo(self, talk: Talk) -> None:
        """The user wants some words repeated."""
        slots = self._rng.choices(("gibberish", "thing", "name", "adjective", "number"), k=self._rng.randint(2, 7))
        text = " ".join(self._words.draw(slot, self._rng) for slot in slots)
        talk.add(fill(self._rng.choice(self._name_lines["echo"]), lambda slot: text), text)

    def _ask(self, talk: Talk) -> None:
        text = expand(self._rng.choice(self._name_lines["ask"]), self._rng)
        talk.add(self._noise.typed(text, self._rng), facts.recall(talk.name))
