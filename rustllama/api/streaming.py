"""An Answer as bytes: one JSON object, or a line or event for each piece as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Protocol

import msgspec
from flask import Response

from rustllama.api.answers import Answer
from rustllama.core import Delta, Loading, Progress, Queued, Reading
from rustllama.errors import Cancelled, RustllamaError

_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Frames(Protocol):
    """How a dialect writes one answer. Made per answer, so that what is the same for each token is encoded once."""

    media_type: str  # of a stream
    opening: bytes  # goes out with the first piece

    def progress(self, progress: Progress) -> bytes: ...

    def piece(self, text: str) -> bytes: ...

    def last(self, delta: Delta) -> bytes:
        """What ends a stream; the text of `delta` went out before."""

    def failure(self, error: RustllamaError) -> bytes:
        """What ends a stream that has begun and cannot go on."""

    def whole(self, text: str, delta: Delta) -> object:
        """The one object of an answer that is not streamed; `delta` is its last."""


def json_response(value: object, media_type: str = "application/json") -> Response:
    """200, ending in a newline."""
    return Response(msgspec.json.encode(value) + b"\n", content_type=media_type)


def respond(answer: Answer, frames: Frames, *, streamed: bool) -> Response:
    """Gives `answer` back when the response ends, or the client is gone, even before the first byte."""
    if not streamed:
        with closing(answer):
            deltas = [event for event in answer if isinstance(event, Delta)]
        return json_response(frames.whole("".join(delta.text for delta in deltas), deltas[-1]))
    response = Response(_lines(answer, frames), content_type=frames.media_type, headers=_STREAM_HEADERS)
    response.call_on_close(answer.close)
    return response


def _lines(answer: Answer, frames: Frames) -> Iterator[bytes]:
    """One bytes object for each piece; called once for every token, so nothing here is done twice."""
    opening = frames.opening
    try:
        for event in answer:
            if not isinstance(event, Delta):
                line = frames.progress(event)
            else:
                line = frames.piece(event.text) if event.text else b""
                if event.finish is not None:
                    line += frames.last(event)
            if line:
                yield opening + line
                opening = b""
    except Cancelled:
        return
    except RustllamaError as error:
        answer.close()
        yield opening + frames.failure(error)


def progress_fields(progress: Progress) -> dict[str, object]:
    """Progress as both dialects tell it; `completed` and `total` are bytes of a model or tokens of a prompt."""
    match progress:
        case Loading(completed, total):
            return {"status": "loading", "completed": completed, "total": total}
        case Queued(position):
            return {"status": "queued", "position": position}
        case Reading(completed, total, cached):
            return {"status": "prompt", "completed": completed, "total": total, "cached": cached}


class Pattern:
    """Writes objects that differ only in some values; `sample` is one of them, with HOLE in the place of each value."""

    HOLE = "\0"  # no model's name can hold it

    def __init__(self, sample: object, *, before: bytes = b"", after: bytes) -> None:
        text = (before + msgspec.json.encode(sample) + after).replace(b"%", b"%%")
        self._format = text.replace(msgspec.json.encode(self.HOLE), b"%b")

    def filled(self, *values: object) -> bytes:
        return self._format % tuple(map(msgspec.json.encode, values))
