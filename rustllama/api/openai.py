"""OpenAI's dialect: `/v1/chat/completions`."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from flask import Flask, Response, request
from msgspec import Meta, Struct

from rustllama.api.answers import Answer, Answers
from rustllama.api.decoding import Fields, refuse_unbuilt, typed
from rustllama.api.failures import encode_failure, openai_shape
from rustllama.api.guard import body
from rustllama.api.jobs import Job
from rustllama.api.options import Options
from rustllama.api.requests import keep_alive_s, model_name, read_messages
from rustllama.api.streaming import Pattern, progress_fields, respond
from rustllama.core import Delta, Progress, Usage
from rustllama.errors import BadRequest, RustllamaError

MaxTokens = Annotated[int, Meta(ge=1, le=1 << 22)]

_UNBUILT: dict[str, tuple[object, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "n": (1,),
    "logit_bias": (),
    "logprobs": (),
    "top_logprobs": (),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}


class StreamOptions(Struct, frozen=True):
    include_usage: bool = False


class CompletionBody(Struct, frozen=True):
    """What OpenAI has and Ollama's options have not."""

    messages: list[dict[str, object]]
    stream: bool = False
    progress: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None


class OpenAI:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def register(self, app: Flask) -> None:
        app.add_url_rule("/v1/chat/completions", view_func=self.chat_completions, methods=["POST"])

    def chat_completions(self) -> Response:
        raw = body()
        refuse_unbuilt(raw, _UNBUILT)
        asked = typed(CompletionBody, raw)
        answer = self._answers.start(_job(raw, asked), request.environ)
        frames = OpenAIFrames(answer, include_usage=asked.stream_options.include_usage)
        return respond(answer, frames, streamed=asked.stream)


class OpenAIFrames:
    """See `streaming.Frames`: server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage
        self._base = {"id": f"chatcmpl-{answer.call.id}", "created": int(time.time()), "model": answer.model}
        self._event = Pattern(self._chunk({"content": Pattern.HOLE}), before=b"data: ", after=b"\n\n")
        self.opening = _event(self._chunk({"role": "assistant", "content": ""}))

    def progress(self, progress: Progress) -> bytes:
        """A chunk that says nothing, with a field of ours."""
        return _event({**self._chunk({}), "progress": progress_fields(progress)})

    def piece(self, text: str) -> bytes:
        return self._event.filled(text)

    def last(self, delta: Delta) -> bytes:
        assert delta.finish is not None
        events = _event({**self._chunk({}, delta.finish.value), **self._warnings()})
        if self._include_usage:
            assert delta.usage is not None
            events += _event({**self._chunk({}), "choices": [], "usage": _usage(delta.usage)})
        return events + b"data: [DONE]\n\n"

    def failure(self, error: RustllamaError) -> bytes:
        return b"data: " + encode_failure(error, self._answer.call, openai_shape) + b"\n\ndata: [DONE]\n\n"

    def whole(self, text: str, delta: Delta) -> dict[str, object]:
        assert delta.finish is not None
        assert delta.usage is not None
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": delta.finish.value}
        usage = _usage(delta.usage)
        return {**self._base, "object": "chat.completion", "choices": [choice], "usage": usage, **self._warnings()}

    def _chunk(self, delta: dict[str, object], finish_reason: str | None = None) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._base, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def _warnings(self) -> dict[str, object]:
        """Ours; absent where there are none, as OpenAI's objects have no such field."""
        return {"warnings": self._answer.warnings} if self._answer.warnings else {}


def _job(raw: Fields, asked: CompletionBody) -> Job:
    if not asked.messages:
        raise BadRequest("'messages' must have at least one message.", "messages")
    options = typed(Options, raw)
    bound = asked.max_completion_tokens or asked.max_tokens
    if bound is not None:
        options = msgspec.structs.replace(options, num_predict=bound)
    messages = read_messages(asked.messages)
    job = Job(model_name(raw), options, messages, keep_alive_s=keep_alive_s(raw), truncate=False)
    return job.telling(asked.progress, streamed=asked.stream)


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
