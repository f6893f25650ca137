"""The bundled model, as shipped: what it answers to sentences it never saw in training, through llama.cpp, greedily."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from rustllama import gguf
from rustllama.core import SamplingParams
from rustllama.demo import facts
from rustllama.demo.corpus import Corpus
from rustllama.demo.intents import INTENTS, UNKNOWN
from rustllama.demo.wordings import expansions, intent_wordings, normal
from rustllama.engine.native import Context, Model, Sampler
from rustllama.engine.sampling import chain
from rustllama.templates import ChatTemplate

DATA = Path(__file__).parent / "data"
DEMO = Path(facts.__file__).parent / "demo.gguf"
ANSWERS = {intent.id: intent.answer for intent in INTENTS}
CONTEXT_LENGTH = 1_024
MOST_TOKENS = 120
GREEDY = chain(SamplingParams(temperature=0), vocabulary_size=0, context_length=CONTEXT_LENGTH)
HELD_OUT = json.loads((DATA / "demo_held_out.json").read_text())
FRAMES: list[str] = json.loads((DATA / "demo_new_frames.json").read_text())
REST = json.loads((DATA / "demo_rest.json").read_text())
WELL_KNOWN = {normal(text) for text in (*REST["persona_asked"], *REST["voice_asked"].values())}  # under new personas


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation and what the model must answer at its end. `said` takes turns: user, model, user, ..."""

    said: tuple[str, ...]
    expected: str
    system: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(self.said)]
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


Ask = Callable[[Case], str]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Answers a case; an answer that does not end by itself ends in an ellipsis."""
    model = Model(str(DEMO))
    context = Context(model, n_ctx=CONTEXT_LENGTH, n_slots=1, n_batch=CONTEXT_LENGTH, n_threads=1)
    yield partial(_answer, model, context, ChatTemplate.of(gguf.read(DEMO)))
    context.close()
    model.close()


def _answer(model: Model, context: Context, template: ChatTemplate, case: Case) -> str:
    spans = template.render(case.messages)
    tokens = [token for span in spans for token in model.tokenize(span.text, parse_special=span.trusted)]
    sampler = Sampler(GREEDY)
    context.clear(0)
    position, answer = 0, b""
    for _ in range(MOST_TOKENS):
        count = len(tokens)
        last_only = [i == count - 1 for i in range(count)]
        context.decode(tokens, range(position, position + count), [0] * count, last_only)
        token = context.sample(sampler, count - 1)
        if model.is_eog(token):
            sampler.close()
            return answer.decode(errors="replace")
        answer, position, tokens = answer + model.piece(token), position + count, [token]
    sampler.close()
    return answer.decode(errors="replace") + "..."


def share_right(ask: Ask, cases: list[Case]) -> float:
    """Percent of the cases answered exactly."""
    return 100 * sum(ask(case) == case.expected for case in cases) / len(cases)


def frame_cases() -> list[Case]:
    """Three known wordings of each intent, each in the next of the new frames."""
    known = [(key, expansions(lines[i])[0]) for key, lines in intent_wordings().items() for i in _spread(len(lines))]
    return [
        Case((FRAMES[i % len(FRAMES)].replace("{}", wording),), ANSWERS[key]) for i, (key, wording) in enumerate(known)
    ]


def _spread(count: int) -> tuple[int, int, int]:
    return 0, count // 3, 2 * count // 3


def capital_cases() -> list[Case]:
    frames = REST["capital_frames"]
    return [
        Case((frames[i % len(frames)].format(country),), facts.capital_answer(country, city))
        for i, (country, city) in enumerate(facts.capitals().items())
    ]


def sum_cases() -> list[Case]:
    frames = REST["sum_frames"]
    pairs = [(a, b) for a in range(21) for b in range(21 - a)]
    return [Case((frames[i % len(frames)].format(a=a, b=b),), facts.sum_answer(a, b)) for i, (a, b) in enumerate(pairs)]


def name_cases() -> list[Case]:
    """A name is told, something else is asked, the name is asked for."""
    between = REST["name_between"]
    answers = [ANSWERS["grass_green"], facts.capital_answer("Italy", "Rome"), ANSWERS["list"], facts.sum_answer(4, 5)]
    return [
        Case(
            (
                *(REST["name_told"][i % 4].format(name), facts.greeting(name)),
                *(between[i // 4 % 4], answers[i // 4 % 4]),
                REST["name_asked"][(i + i // 4) % 4],
            ),
            facts.recall(name),
        )
        for i, name in enumerate(REST["names"])
    ]


def persona_cases() -> list[Case]:
    """Names never seen, asked for; then voices, each asked three things."""
    named = [
        Case(
            (REST["persona_asked"][i // 4 % 4],),
            facts.Persona(name=name).says("who_are_you", ""),
            system=REST["persona_names"][i % 4].format(name),
        )
        for i, name in enumerate(REST["names"])
    ]
    voiced = [
        Case((question,), says.replace("{}", ANSWERS[key]), system=system)
        for system, says in REST["personas"]
        for key, question in REST["voice_asked"].items()
    ]
    return named + voiced


def unknown_cases() -> list[Case]:
    return [Case((question,), UNKNOWN) for question in [*REST["unknown"], *HELD_OUT["unknown"]]]


def wording_cases() -> list[Case]:
    return [Case((item["question"],), ANSWERS[item["intent"]]) for item in HELD_OUT["wordings"]]


@pytest.mark.parametrize(
    ("cases", "target"),
    [
        pytest.param(frame_cases, 95, id="a new frame around a known wording"),
        pytest.param(wording_cases, 70, id="a wording wholly new"),
        pytest.param(capital_cases, 90, id="capitals"),
        pytest.param(sum_cases, 90, id="sums to twenty"),
        pytest.param(name_cases, 90, id="a name told two turns earlier"),
        pytest.param(persona_cases, 90, id="a persona from the system message"),
        pytest.param(unknown_cases, 90, id="what it does not know"),
    ],
)
def test_the_shipped_model_answers_what_training_never_saw(
    ask: Ask, cases: Callable[[], list[Case]], target: float
) -> None:
    assert share_right(ask, cases()) >= target


def test_every_answer_ends_by_itself(ask: Ask) -> None:
    strange = ["", "?", "\n\n\n", "{}[]()<>", "<|im_end|>", "zzz", "12345"]
    odd = [Case((text,), "") for text in strange]
    assert [case.said for case in [*odd, *unknown_cases()] if ask(case).endswith("...")] == []


def test_no_held_out_sentence_is_in_the_corpus() -> None:
    cases = [*wording_cases(), *frame_cases(), *capital_cases(), *unknown_cases(), *persona_cases()]
    held_out = {normal(text) for case in cases for text in (case.said[-1], case.system)} - {""} - WELL_KNOWN
    corpus = Corpus(seed=1)
    drawn = {normal(message.content) for _ in range(50_000) for message in corpus.dialogue()}
    written = {normal(text) for lines in intent_wordings().values() for line in lines for text in expansions(line)}
    assert held_out & (drawn | written) == set()


def test_no_name_of_the_test_is_in_the_corpus() -> None:
    corpus = Corpus(seed=2)
    words = {word for _ in range(20_000) for message in corpus.dialogue() for word in message.content.split()}
    assert set(REST["names"]) & words == set()


def test_every_intent_has_forty_wordings() -> None:
    assert {key: len(lines) for key, lines in intent_wordings().items() if len(lines) < 40} == {}
    assert set(intent_wordings()) == set(ANSWERS)


def test_the_file_is_small_and_says_what_it_is() -> None:
    info = gguf.read(DEMO)
    assert info.size_bytes <= 4_000_000
    assert info.chat_template is not None
    assert info.metadata["general.license"] == "MIT"
    assert "tiny demo model" in str(info.metadata["general.description"])
