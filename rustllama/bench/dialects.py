"""The dialects the bench speaks: how a chat is asked for, and what a line of an answer says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec


@dataclass(frozen=True, slots=True)
class Event:
    """What one line of a stream tells. A count is None where the line has none."""

    has_text: bool = False
    done: bool = False
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    error: str | None = None
    server_ms: Mapping[str, float] = field(default_factory=dict)


class Dialect(Protocol):
    """Each is greedy, so that runs compare."""

    path: str

    def body(self, model: str, prompt: str, answer_tokens: int) -> Mapping[str, object]: ...

    def event(self, line: bytes) -> Event:
        """Of one line that is not empty. Raises msgspec.DecodeError where it is not of this dialect."""


class _Message(msgspec.Struct):
    content: str = ""
    thinking: str = ""


class _OllamaLine(msgspec.Struct):
    message: _Message = msgspec.field(default_factory=_Message)
    done: bool = False
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    queue_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_duration: int | None = None
    eval_duration: int | None = None
    error: str | None = None

    def durations_ms(self) -> dict[str, float]:
        spent_ns = {
            "queue": self.queue_duration,
            "load": self.load_duration,
            "prompt": self.prompt_eval_duration,
            "answer": self.eval_duration,
        }
        return {name: spent / 1e6 for name, spent in spent_ns.items() if spent is not None}


class Ollama:
    """Newline-delimited JSON of /api/chat, which rustllama speaks too."""

    path = "/api/chat"

    def body(self, model: str, prompt: str, answer_tokens: int) -> Mapping[str, object]:
        return {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "options": {"temperature": 0, "num_predict": answer_tokens},
        }

    def event(self, line: bytes) -> Event:
        said = msgspec.json.decode(line, type=_OllamaLine)
        has_text = bool(said.message.content or said.message.thinking)
        return Event(has_text, said.done, said.prompt_eval_count, said.eval_count, said.error, said.durations_ms())


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _TokenCounts(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _OpenAIEvent(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _TokenCounts | None = None
    error: object = None


class OpenAI:
    """Server-sent events of /v1/chat/completions."""

    path = "/v1/chat/completions"

    def body(self, model: str, prompt: str, answer_tokens: int) -> Mapping[str, object]:
        return {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": answer_tokens,
        }

    def event(self, line: bytes) -> Event:
        field, _, data = line.partition(b":")
        if field != b"data":
            return Event()
        if data.strip() == b"[DONE]":
            return Event(done=True)
        said = msgspec.json.decode(data, type=_OpenAIEvent)
        usage = said.usage or _TokenCounts()
        has_text = any(choice.delta.content or choice.delta.reasoning_content for choice in said.choices)
        error = None if said.error is None else error_text(data)
        return Event(has_text, False, usage.prompt_tokens, usage.completion_tokens, error)


DIALECTS: Mapping[str, Dialect] = {"rustllama": Ollama(), "ollama": Ollama(), "openai": OpenAI()}


def error_text(body: bytes) -> str:
    """The message in any of the shapes servers give errors, or the body's beginning."""
    try:
        error = msgspec.json.decode(body, type=dict[str, object]).get("error")
    except msgspec.DecodeError:
        error = None
    if isinstance(error, dict):
        error = error.get("message")
    return str(error) if error else body[:200].decode(errors="replace").strip()
