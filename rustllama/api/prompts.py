"""Messages to tokens: the model's template, and what is left out of a conversation that outgrew its context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile

from rustllama.api.jobs import Job
from rustllama.api.renderer import Renderer
from rustllama.api.requests import Turn
from rustllama.core import ContextShift, Engine, ModelRecord, Span
from rustllama.engine import context_shift
from rustllama.errors import ContextExceeded, TemplateRefused
from rustllama.templates import Messages, TemplateSource

# No text has so few tokens. What is longer is not even tokenized: tokenizers take seconds for megabytes.
_BYTES_PER_TOKEN = 64
# Some texts cost llama.cpp the square of their tokens: special tokens, and bytes that SentencePiece has no words for.
# What is longer is counted in pieces first, and is too long where they have so many times what the context holds.
_QUICK_BYTES = 128 << 10
_PIECE_CHARACTERS = 4096
_FAR_TOO_LONG = 2
# A cut moves by this share of the context, so that the next turns begin with the same text and reuse it.
_STEPS = 4

_RAW_KEPT = 4  # tokens that a shift keeps of a raw prompt where `num_keep` says nothing: Ollama's
_QUESTION = {"role": "user", "content": "?"}
_EXCHANGE = (_QUESTION, {"role": "assistant", "content": "!"})

_NO_TEMPLATE = "the model's file has no chat template: ChatML was used"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be computed; it leaves room for a token."""

    tokens: tuple[int, ...]
    truncated_messages: int = 0
    warnings: tuple[str, ...] = ()
    shift: ContextShift | None = None


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt that can be shortened: `render(start)` leaves out what precedes message `start`, but no system message.

    `starts` are the messages it may begin with, the first for all of it.
    """

    render: Callable[[int], tuple[Span, ...]]
    size_bytes: Callable[[int], int]
    starts: Sequence[int] = (0,)


@dataclass(frozen=True, slots=True)
class _Template:
    """`render` makes a prompt of each conversation, in one go."""

    render: Callable[[Sequence[Messages]], tuple[tuple[Span, ...], ...]]
    uses_fallback: bool


class Prompts:
    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def expect(self, job: Job, record: ModelRecord) -> None:
        """Prepares for `build`, while the model is loaded."""
        if job.raw_prompt is None:
            self._renderer.expect(_source(job, record), brought=job.template is not None)

    def build(self, job: Job, record: ModelRecord, engine: Engine, num_ctx: int) -> Prompt:
        """Raises TemplateRefused, and ContextExceeded for what does not fit or may not be shortened."""
        if job.raw_prompt is not None:
            return _raw(job, job.raw_prompt, engine, num_ctx)
        source, limit_bytes = _source(job, record), _BYTES_PER_TOKEN * num_ctx
        render = partial(self._renderer.render, source, brought=job.template is not None, limit_bytes=limit_bytes)
        return _chat(job, _Template(render, source.template is None), engine, num_ctx)


def _source(job: Job, record: ModelRecord) -> TemplateSource:
    return TemplateSource.of(record.info, job.template or record.preset.template)


def _raw(job: Job, prompt: str, engine: Engine, num_ctx: int) -> Prompt:
    """A prompt without a template: its special tokens are the client's own."""
    span = Span(prompt, trusted=True)
    text = _Text(render=lambda _: (span,), size_bytes=lambda _: len(prompt.encode()))
    tokens = _fit(text, job, engine, num_ctx)[1]
    asked = _RAW_KEPT if job.options.num_keep is None else job.options.num_keep
    keep = asked if 0 <= asked < len(tokens) else len(tokens)
    return Prompt(tokens, shift=_with_room(ContextShift(keep), num_ctx) if job.shift else None)


def _chat(job: Job, template: _Template, engine: Engine, num_ctx: int) -> Prompt:
    messages = job.messages
    text = _Text(
        render=lambda start: template.render([_kept(messages, start)])[0],
        size_bytes=lambda start: sum(_size_bytes(turn) for turn in _kept(messages, start)),
        starts=_starts(messages) if job.truncate else (0,),
    )
    start, tokens = _fit(text, job, engine, num_ctx)
    kept = _kept(messages, start)
    left_out = len(messages) - len(kept)
    warnings = [_NO_TEMPLATE] if template.uses_fallback else []
    if left_out:
        warnings.append(f"the {left_out} oldest messages of {len(messages)} were left out to fit {num_ctx} tokens")
    shift = _chat_shift(kept, template, engine, tokens, job.options.num_keep or 0) if job.shift else None
    return Prompt(tokens, left_out, tuple(warnings), shift and _with_room(shift, num_ctx))


def _chat_shift(
    messages: Sequence[Turn], template: _Template, engine: Engine, tokens: tuple[int, ...], num_keep: int
) -> ContextShift:
    head = list(takewhile(lambda turn: turn["role"] == "system", messages))
    prompts = template.render([[*head, *turns] for turns in ((_QUESTION,), (*_EXCHANGE, _QUESTION))])
    asked, again = (engine.tokenize(spans, add_special=True) for spans in prompts)
    return context_shift.of_chat(tokens, asked, again, num_keep)


def _with_room(shift: ContextShift, num_ctx: int) -> ContextShift:
    if not context_shift.leaves_room(shift.keep, num_ctx):
        raise ContextExceeded(
            f"'shift' would keep {shift.keep} tokens, the system message and what 'num_keep' asks for, of a context of "
            f"{num_ctx} tokens: keep less, or ask for a larger 'num_ctx'."
        )
    return shift


def _size_bytes(turn: Turn) -> int:
    """Even an empty turn is a token."""
    return _BYTES_PER_TOKEN + len(turn["content"].encode())


def cut(weight: Callable[[int], int], starts: Sequence[int], limit: int, step: int) -> int:
    """The index in `starts` of the first one that leaves at most `limit`, dropping in whole steps; else of the last.

    Adding to the end leaves the answer as it is until another step has to go.
    """
    total = weight(starts[0])
    if total <= limit:
        return 0
    drop = -(-(total - limit) // step) * step
    found = bisect_left(starts, drop, key=lambda start: total - weight(start))
    return min(found, len(starts) - 1)


def _fit(text: _Text, job: Job, engine: Engine, num_ctx: int) -> tuple[int, tuple[int, ...]]:
    most_bytes = _BYTES_PER_TOKEN * num_ctx

    spans = cache(text.render)

    @cache
    def tokens(start: int) -> tuple[int, ...]:
        return engine.tokenize(spans(start), add_special=True, as_written=not job.options.reproducible, owner=job.owner)

    @cache
    def length(start: int) -> int:
        about = _tokens_in_pieces(spans(start), engine)
        return about if about > _FAR_TOO_LONG * num_ctx else len(tokens(start))

    starts = text.starts[cut(text.size_bytes, text.starts, most_bytes, most_bytes // _STEPS) :]
    size_bytes = text.size_bytes(starts[0])
    if size_bytes > most_bytes:
        raise _too_long(f"about {size_bytes} bytes", num_ctx)
    start = starts[cut(length, starts, num_ctx - 1, max(1, num_ctx // _STEPS))]
    if length(start) >= num_ctx:
        raise _too_long(f"{length(start)} tokens", num_ctx)
    if not tokens(start):
        raise TemplateRefused(
            "The prompt is empty for this model: its template or its vocabulary drops all that was said."
        )
    return start, tokens(start)


def _tokens_in_pieces(spans: tuple[Span, ...], engine: Engine) -> int:
    """About how many a long text has; 0 for one that is quickly tokenized as a whole."""
    if sum(len(span.text.encode()) for span in spans) <= _QUICK_BYTES:
        return 0
    pieces = (
        Span(span.text[place : place + _PIECE_CHARACTERS], span.trusted)
        for span in spans
        for place in range(0, len(span.text), _PIECE_CHARACTERS)
    )
    return len(engine.tokenize(tuple(pieces), add_special=False, as_written=False))


def _too_long(length: str, num_ctx: int) -> ContextExceeded:
    return ContextExceeded(
        f"The prompt has {length}, and the context holds {num_ctx} tokens with the answer: "
        "shorten the prompt or ask for a larger 'num_ctx'."
    )


def _kept(messages: Sequence[Turn], start: int) -> list[Turn]:
    return [turn for index, turn in enumerate(messages) if index >= start or turn["role"] == "system"]


def _starts(messages: Sequence[Turn]) -> list[int]:
    """All, and each later turn of a user's; the last message is never left out."""
    spoken = [index for index, turn in enumerate(messages) if turn["role"] != "system"]
    return [0, *(index for index in spoken[1:] if messages[index]["role"] == "user")]
