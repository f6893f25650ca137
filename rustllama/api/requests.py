"""The parts of a body that both dialects share: the model's name, messages, durations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from rustllama.api.decoding import Fields, refuse_unbuilt, typed, wrong
from rustllama.errors import BadRequest, Unsupported
from rustllama.registry import check_name
from rustllama.settings import FOREVER, parse_duration_s

Turn = Mapping[str, str]
"""A message as a template takes it: `role` and `content`."""

_LONGEST_S = 10.0**9  # beyond it a timer is as good as none
MOST_ITEMS = 10_000  # messages, or parts of one; each costs time, also where it is left out
_LONGEST_DURATION = 40  # characters; its pattern takes long on long ones
_UNBUILT_IN_A_MESSAGE: dict[str, tuple[object, ...]] = {
    "images": (),
    "tool_calls": (),
    "function_call": (),
    "audio": (),
}


class Message(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, object]] | None = None


class Part(Struct, frozen=True):
    """A piece of a message's content, as OpenAI's clients send it."""

    type: str
    text: str = ""


def model_name(raw: Fields) -> str:
    """The model of a request, from `model` or its alias `name`. Raises BadRequest."""
    field = "name" if raw.get("model") is None and raw.get("name") is not None else "model"
    value = raw.get(field)
    if value is None or value == "":
        raise BadRequest("'model' is missing: name one of the models that /api/list shows.", "model")
    if not isinstance(value, str):
        raise wrong(field, "a string", value)
    return check_name(value)


def keep_alive_s(raw: Fields) -> float | None:
    """Seconds of `keep_alive`: a number or "5m"; negative is for ever, None the server's setting. Raises BadRequest."""
    value = raw.get("keep_alive")
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return FOREVER if not 0 <= value <= _LONGEST_S else float(value)
    try:
        seconds = parse_duration_s(value if isinstance(value, str) and len(value) <= _LONGEST_DURATION else "")
    except ValueError:
        raise wrong("keep_alive", 'a number of seconds or a duration like "5m"', value) from None
    return seconds if seconds <= _LONGEST_S else FOREVER


def read_messages(raw: list[dict[str, object]]) -> tuple[Turn, ...]:
    """Messages as templates take them. Raises BadRequest naming the message and its field."""
    _check_count(raw, "messages")
    return tuple(_turn(fields, f"messages[{index}].") for index, fields in enumerate(raw))


def _check_count(items: list[dict[str, object]], where: str) -> None:
    if len(items) > MOST_ITEMS:
        raise BadRequest(f"'{where}' has {len(items)} items: send at most {MOST_ITEMS}.", where)


def _turn(raw: Fields, path: str) -> Turn:
    refuse_unbuilt(raw, _UNBUILT_IN_A_MESSAGE, path)
    message = typed(Message, raw, path)
    role = "system" if message.role == "developer" else message.role
    if message.content is None and role != "assistant":
        raise BadRequest(f"'{path}content' is missing: it must be a string.", f"{path}content")
    if isinstance(message.content, list):
        _check_count(message.content, f"{path}content")
        content = "\n".join(_text(part, f"{path}content[{index}].") for index, part in enumerate(message.content))
        return {"role": role, "content": content}
    return {"role": role, "content": message.content or ""}


def _text(raw: Fields, path: str) -> str:
    part = typed(Part, raw, path)
    if part.type not in ("text", "input_text"):
        raise Unsupported(f"'{path}type' is {part.type[:40]!r}: only text is supported yet.", f"{path}type")
    return part.text
