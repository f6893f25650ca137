"""What a rustllama server answers, as the console reads it."""

from __future__ import annotations

from typing import Any

import msgspec


class Version(msgspec.Struct, frozen=True):
    version: str
    rustllama: str


class Details(msgspec.Struct, frozen=True):
    family: str = ""
    parameter_size: str = ""
    quantization_level: str = ""


class Model(msgspec.Struct, frozen=True):
    """A registered name. `size` is in bytes, `modified_at` RFC 3339."""

    name: str
    path: str = ""
    modified_at: str = ""
    size: int = 0
    details: Details = Details()
    origin: str = ""


class LoadedModel(msgspec.Struct, frozen=True):
    """A model in memory. `size` is in bytes, `context_length` in tokens; no `expires_at`: it stays."""

    name: str
    size: int = 0
    context_length: int = 0
    slots: int = 0
    running: int = 0
    queued: int = 0
    expires_at: str | None = None


class Pulled(msgspec.Struct, frozen=True):
    """A line of a pull: of the file `digest`, `completed` of `total` bytes are there. The last has "success"."""

    status: str = ""
    digest: str = ""
    total: int = 0
    completed: int = 0
    model: str = ""
    error: str | None = None


class ModelCard(msgspec.Struct, frozen=True):
    """What a server tells of one model; `model_info` has the keys of the GGUF."""

    details: Details = Details()
    model_info: dict[str, Any] = {}
    template: str = ""
    license: str | None = None
    path: str = ""
    origin: str = ""
    sha256: str = ""


class Message(msgspec.Struct, frozen=True):
    role: str = "assistant"
    content: str = ""


class Reply(msgspec.Struct, frozen=True):
    """One line of an answer. The last has `done`, the counts in tokens and the durations in nanoseconds.

    Lines with a `status` come before the first word: "loading" with `completed` and `total` in bytes, "queued" with a
    `position` of which 1 is the next, "prompt" with `completed`, `total` and `cached` in tokens.
    """

    model: str = ""
    status: str = ""
    completed: int = 0
    total: int = 0
    cached: int = 0
    position: int = 0
    message: Message = Message()
    done: bool = False
    error: str | None = None
    warnings: list[str] = []
    load_duration: int = 0
    queue_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_cached_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class Listing(msgspec.Struct, frozen=True):
    """All registered names, and what the user should know of them."""

    models: list[Model]
    warnings: list[str] = []
