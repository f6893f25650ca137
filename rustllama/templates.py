"""Chat templates: messages become a prompt by the Jinja that a model's file carries, in a sandbox.

What the environment offers follows transformers' `apply_chat_template`, for which templates are written. Special tokens
come from the template and never from a message: text of a message that spells one is a private character while the
template runs, and a span of its own, not trusted, in the result. All other text stays joined, as it was tokenized in
training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from itertools import product
from typing import Any, NoReturn

import msgspec
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rustllama.core import ModelInfo, Span
from rustllama.errors import TemplateRefused

Messages = Sequence[Mapping[str, object]]

CHATML = (  # the bundled model's too, word for word
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_NEEDLE = "needle"
_FIRST_MARKER, _LAST_MARKER = "\U000f0000", "\U000ffffd"
_MOST_MARKERS = ord(_LAST_MARKER) - ord(_FIRST_MARKER) + 1
_ANY_MARKER = f"[{_FIRST_MARKER}-{_LAST_MARKER}]"
_LIKELY_SPECIAL = r"<[|｜][^\s<>]{1,100}[|｜]>"  # where a model's own are not known
_USUAL_TOKEN = re.compile(r"<\S{1,40}")  # searching for some others takes long, like `1x` in a text of digits
_MOST_USUAL_TOKENS = 100
_FAILURES = (  # of a template
    *(TemplateError, ArithmeticError, AttributeError, LookupError),
    *(MemoryError, RecursionError, SyntaxError, TypeError, ValueError),
)


class TemplateSource(msgspec.Struct, frozen=True):
    """What a template is compiled from."""

    key: bytes  # of equal ones it is equal
    template: str | None  # Jinja; None is ChatML
    bos_token: str
    eos_token: str
    special_tokens: tuple[str, ...]

    @classmethod
    def of(cls, info: ModelInfo, template: str | None = None) -> TemplateSource:
        """The template of a model's file, or `template` with that model's special tokens."""
        special = info.metadata.get("tokenizer.ggml.control_tokens", [])
        return cls._made(
            info.chat_template if template is None else template,
            str(info.metadata.get("tokenizer.ggml.bos_token", "")),
            str(info.metadata.get("tokenizer.ggml.eos_token", "")),
            tuple(map(str, special)) if isinstance(special, list) else (),
        )

    @classmethod
    def alone(cls, template: str) -> TemplateSource:
        """A template of which nobody has said yet for which model it is."""
        return cls._made(template, "", "", ())

    @classmethod
    def _made(cls, *parts: Any) -> TemplateSource:
        return cls(blake2b(msgspec.msgpack.encode(parts), digest_size=16).digest(), *parts)

    @property
    def is_harmless(self) -> bool:
        """Whether it is known to be neither slow nor large, whatever the messages."""
        special = {self.bos_token, self.eos_token, *self.special_tokens} - {""}
        return (
            self.template in (None, CHATML)
            and len(special) <= _MOST_USUAL_TOKENS
            and all(_USUAL_TOKEN.fullmatch(token) for token in special)
        )


class ChatTemplate:
    """Compiled once; `render` may be called in several threads."""

    def __init__(
        self, source: str | None, *, bos_token: str, eos_token: str, special_tokens: Iterable[str] = ()
    ) -> None:
        """None is ChatML. In `special_tokens` any number stands for all numbers. Raises TemplateRefused."""
        self.uses_fallback = source is None
        self._constants = {"bos_token": bos_token, "eos_token": eos_token}
        self._special = _Special(frozenset(special_tokens), {bos_token, eos_token} - {""})
        try:
            self._template = _environment().from_string(CHATML if source is None else source)
        except _FAILURES as error:
            raise TemplateRefused(f"The chat template cannot be read: {error}.") from None
        self._absent, self._wants_parts = self._adapted()
        self._takes_system = self._shows(self._fit([{"role": "system", "content": _NEEDLE}, _user("hello")]))

    @classmethod
    def of(cls, info: ModelInfo, source: str | None = None) -> ChatTemplate:
        """The template of a model's file, or `source` with that model's special tokens. Raises TemplateRefused."""
        return cls.compiled(TemplateSource.of(info, source))

    @classmethod
    def compiled(cls, source: TemplateSource) -> ChatTemplate:
        """Raises TemplateRefused."""
        return cls(
            source.template,
            bos_token=source.bos_token,
            eos_token=source.eos_token,
            special_tokens=source.special_tokens,
        )

    def render(
        self, messages: Messages, *, tools: Sequence[object] | None = None, add_generation_prompt: bool = True
    ) -> tuple[Span, ...]:
        """The prompt. A template that takes no system message finds it in the user's first.

        Raises TemplateRefused with the template's own words.
        """
        markers = _Markers(self._special)
        hidden = [{key: markers.hide(value) for key, value in message.items()} for message in messages]
        folded = hidden if self._takes_system else _fold_system(hidden)
        try:
            text = self._run(self._fit(folded), markers.hide(tools), add_generation_prompt)
        except _FAILURES as error:
            words = "it needs too much memory" if isinstance(error, MemoryError) else error
            raise TemplateRefused(f"The model's chat template refuses these messages: {words}") from None
        return markers.spans(text)

    def _adapted(self) -> tuple[dict[str, None], bool]:
        """Templates differ in whether absent tools are None or undefined, and content a text or a list of parts."""
        none, undefined = {"tools": None, "documents": None}, dict[str, None]()
        for choice in product((none, undefined), (False, True)):
            self._absent, self._wants_parts = choice
            if self._shows(self._fit([_user(_NEEDLE)])):
                return choice
        return none, False

    def _run(self, messages: Messages, tools: object = None, add_generation_prompt: bool = True) -> str:
        lists = {**self._absent, "tools": tools} if tools else self._absent
        return self._template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **lists, **self._constants
        )

    def _shows(self, messages: Messages) -> bool:
        """Whether what these messages say gets into the prompt."""
        try:
            return _NEEDLE in self._run(messages)
        except _FAILURES:
            return False

    def _fit(self, messages: Messages) -> Messages:
        """Gives content as the template wants it: text, or a list of parts."""
        if not self._wants_parts:
            return messages
        texts = ((message, message.get("content")) for message in messages)
        return [{**message, "content": _parts(text) if isinstance(text, str) else text} for message, text in texts]


def _user(content: object) -> Mapping[str, object]:
    return {"role": "user", "content": content}


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _fold_system(messages: Messages) -> Messages:
    """Moves what system messages say to the beginning of the user's turn that follows."""
    result: list[Mapping[str, object]] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(str(message["content"]))
        elif message["role"] == "user" and waiting:
            result.append({**message, "content": "\n\n".join([*waiting, str(message["content"])])})
            waiting.clear()
        else:
            result.append(message)
    return [*result, _user("\n\n".join(waiting))] if waiting else result


class _Special:
    """Finds special tokens, and the beginning of one at the end of a text, which another text might complete."""

    def __init__(self, known: frozenset[str], others: set[str]) -> None:
        tokens = known | others
        spelled = [re.sub(r"\d+", r"\\d+", re.escape(token)) for token in sorted(tokens, key=len, reverse=True)]
        self.pattern = re.compile("|".join([*spelled, _ANY_MARKER] + ([] if known else [_LIKELY_SPECIAL])))
        self._beginnings = {token[:length] for token in tokens for length in range(1, len(token))}
        self._longest = max(map(len, self._beginnings), default=0)

    def beginning_at_end(self, text: str) -> str:
        endings = (text[-length:] for length in range(min(self._longest, len(text)), 0, -1))
        return next((ending for ending in endings if ending in self._beginnings), "")


class _Markers:
    """The private characters of one prompt, each of which stands for a text."""

    def __init__(self, special: _Special) -> None:
        self._special = special
        self._of: dict[str, str] = {}

    def hide(self, value: object) -> object:
        """The value with each special token in its texts as a marker, however deep."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _hide_text(self, text: str) -> str:
        text = self._special.pattern.sub(lambda match: self._marker(match.group()), text)
        ending = self._special.beginning_at_end(text)
        return text[: -len(ending)] + self._marker(ending) if ending else text

    def _marker(self, text: str) -> str:
        if len(self._of) == _MOST_MARKERS and text not in self._of:
            raise TemplateRefused("The messages spell too many special tokens; send fewer.")
        return self._of.setdefault(text, chr(ord(_FIRST_MARKER) + len(self._of)))

    def spans(self, text: str) -> tuple[Span, ...]:
        texts = {marker: text for text, marker in self._of.items()}
        pieces = re.split(f"({_ANY_MARKER}+)", text)
        spans = (
            Span("".join(texts.get(marker, marker) for marker in piece) if odd else piece, trusted=not odd)
            for piece, odd in zip(pieces, (number % 2 for number in range(len(pieces))), strict=True)
        )
        return tuple(span for span in spans if span.text)


class _Generation(Extension):
    """`{% generation %}` marks, for training, what the assistant said."""

    tags = {"generation"}  # noqa: RUF012 (so it is in Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which models never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
