"""Ollama's dialect: `/api/chat` and `/api/generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

import msgspec
from flask import Flask, Response, request
from msgspec import Struct

from rustllama.api.access import Call, call_of
from rustllama.api.answers import Answer, Answers
from rustllama.api.decoding import Fields, refuse_unbuilt, typed
from rustllama.api.failures import encode_failure, ollama_shape
from rustllama.api.guard import body
from rustllama.api.jobs import Job
from rustllama.api.options import read_options
from rustllama.api.requests import Turn, keep_alive_s, model_name, read_messages
from rustllama.api.streaming import Pattern, json_response, progress_fields, respond
from rustllama.core import Delta, Progress, Usage
from rustllama.errors import BadRequest, RustllamaError

Piece = Callable[[str], dict[str, object]]
"""The field of a reply that holds the text."""

_NDJSON = "application/x-ndjson"
_UNBUILT = ("format", "think", "logprobs", "top_logprobs")
_UNBUILT_IN_CHAT = dict.fromkeys(("tools", *_UNBUILT), ())
_UNBUILT_IN_GENERATE = dict.fromkeys(("suffix", "images", "context", *_UNBUILT), ())


class Common(Struct, frozen=True):
    """What both endpoints take, besides the model and `keep_alive`."""

    options: dict[str, object] = {}
    stream: bool = False
    progress: bool = False
    shift: bool = False
    forget: bool = False


class ChatBody(Common, frozen=True):
    messages: list[dict[str, object]] = []
    truncate: bool = True


class GenerateBody(Common, frozen=True):
    prompt: str = ""
    system: str = ""
    template: str = ""
    raw: bool = False


class Ollama:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def register(self, app: Flask) -> None:
        app.add_url_rule("/api/chat", view_func=self.chat, methods=["POST"])
        app.add_url_rule("/api/generate", view_func=self.generate, methods=["POST"])

    def chat(self) -> Response:
        raw = body()
        refuse_unbuilt(raw, _UNBUILT_IN_CHAT)
        asked = typed(ChatBody, raw)
        job = replace(_job(raw, asked), messages=read_messages(asked.messages), truncate=asked.truncate)
        return self._reply(job, _message, streamed=asked.stream)

    def generate(self) -> Response:
        raw = body()
        refuse_unbuilt(raw, _UNBUILT_IN_GENERATE)
        asked = typed(GenerateBody, raw)
        job = _job(raw, asked)
        if asked.raw and (asked.system or asked.template):
            raise BadRequest("'raw' takes the prompt as it is: leave out 'system' and 'template'.", "raw")
        if asked.raw:
            job = replace(job, raw_prompt=asked.prompt)
        else:
            job = replace(job, messages=_turns(asked), template=asked.template or None)
        return self._reply(job, _response, streamed=asked.stream)

    def _reply(self, job: Job, piece: Piece, *, streamed: bool) -> Response:
        if job.is_empty and job.keep_alive_s == 0:
            return self._unload(job, piece, streamed=streamed)
        answer = self._answers.start(job, request.environ)
        return respond(answer, OllamaFrames(answer, piece), streamed=streamed)

    def _unload(self, job: Job, piece: Piece, *, streamed: bool) -> Response:
        self._answers.unload(job, request.environ)
        ending = _ending(call_of(request.environ), "unload", Usage(), 0, ())
        reply = {"model": job.model, "created_at": _now(), **piece(""), **ending}
        return json_response(reply, _NDJSON if streamed else "application/json")


class OllamaFrames:
    """See `streaming.Frames`."""

    media_type = _NDJSON
    opening = b""

    def __init__(self, answer: Answer, piece: Piece) -> None:
        self._answer = answer
        self._piece = piece
        hole = Pattern.HOLE
        self._line = Pattern({"model": answer.model, "created_at": hole, **piece(hole), "done": False}, after=b"\n")

    def progress(self, progress: Progress) -> bytes:
        line = {"model": self._answer.model, "created_at": _now(), **self._piece(""), "done": False}
        return msgspec.json.encode({**progress_fields(progress), **line}) + b"\n"

    def piece(self, text: str) -> bytes:
        return self._line.filled(_now(), text)

    def last(self, delta: Delta) -> bytes:
        return msgspec.json.encode(self.whole("", delta)) + b"\n"

    def failure(self, error: RustllamaError) -> bytes:
        return encode_failure(error, self._answer.call, ollama_shape) + b"\n"

    def whole(self, text: str, delta: Delta) -> dict[str, object]:
        answer = self._answer
        assert delta.finish is not None
        ending = _ending(answer.call, delta.finish.value, delta.usage or Usage(), answer.load_ns, answer.warnings)
        if answer.truncated_messages:
            ending["truncated_messages"] = answer.truncated_messages
        return {"model": answer.model, "created_at": _now(), **self._piece(text), **ending}


def _message(text: str) -> dict[str, object]:
    return {"message": {"role": "assistant", "content": text}}


def _response(text: str) -> dict[str, object]:
    return {"response": text}


def _ending(call: Call, reason: str, usage: Usage, load_ns: int, warnings: tuple[str, ...]) -> dict[str, object]:
    """What the last object of a reply adds; durations in nanoseconds."""
    return {
        "done": True,
        "done_reason": reason,
        "total_duration": call.elapsed_ns,
        "load_duration": load_ns,
        "queue_duration": usage.queue_ns,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_cached_count": usage.cached_tokens,
        "prompt_eval_duration": usage.prompt_ns,
        "eval_count": usage.completion_tokens,
        "eval_duration": usage.eval_ns,
        "warnings": warnings,
    }


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _job(raw: Fields, asked: Common) -> Job:
    """What both endpoints have in common."""
    options, warnings = read_options(asked.options)
    job = Job(model_name(raw), options, keep_alive_s=keep_alive_s(raw), forget=asked.forget, warnings=warnings)
    return replace(job.telling(asked.progress, streamed=asked.stream), shift=asked.shift)


def _turns(asked: GenerateBody) -> tuple[Turn, ...]:
    """Nothing without a prompt: that only loads the model."""
    system = [{"role": "system", "content": asked.system}] if asked.system else []
    return (*system, {"role": "user", "content": asked.prompt}) if asked.prompt else ()
