"""The options of a request: their names and ranges, and what the engine makes of them."""

from __future__ import annotations

import difflib
from contextlib import suppress
from dataclasses import fields
from typing import Annotated

from msgspec import Meta, Struct

from rustllama.api.decoding import Fields, typed
from rustllama.core import LoadOptions, ModelInfo, ModelRecord, SamplingParams
from rustllama.errors import BadRequest

# Beyond these ranges llama.cpp wraps round, allocates without end or kills the process.
Context = Annotated[int, Meta(ge=16, le=1 << 22)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-10, le=10)]
StopString = Annotated[str, Meta(max_length=1000)]

_KEYS_IN_A_FILE = {  # llama.cpp, llama-arch.cpp: LLM_KV_GENERAL_SAMPLING_*
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_last_n": "penalty_last_n",
    "repeat_penalty": "penalty_repeat",
}
_SEEDS = 0xFFFFFFFF  # llama.cpp's own "random"
_MOST_WARNINGS = 10  # about unknown options


class Options(Struct, frozen=True, kw_only=True):
    """Ollama's names; None was not given."""

    num_ctx: Context | None = None
    num_predict: Annotated[int, Meta(ge=-2, le=1 << 22)] | None = None
    num_keep: Annotated[int, Meta(ge=-1, le=1 << 22)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=64)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 20)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    typical_p: Probability | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=1 << 20)] | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.1, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    num_gpu: Annotated[int, Meta(ge=-1, le=1024)] | None = None
    num_thread: Annotated[int, Meta(ge=0, le=512)] | None = None
    num_batch: Annotated[int, Meta(ge=1, le=8192)] | None = None
    use_mmap: bool | None = None
    reproducible: bool | None = None

    @property
    def max_tokens(self) -> int | None:
        """None where only the context bounds the answer."""
        return self.num_predict if self.num_predict and self.num_predict > 0 else None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def sampling(self, recommended: Options) -> SamplingParams:
        """The request's values before those that the model's file recommends, before the defaults."""
        names = [spec.name for spec in fields(SamplingParams)]
        given = {
            name: value
            for name in names
            for value in (getattr(recommended, name), getattr(self, name))
            if value is not None
        }
        if self.reproducible:
            given["seed"] = 0
        if self.seed is not None:
            given["seed"] = -1 if self.seed < 0 else self.seed % _SEEDS
        return SamplingParams(**given)

    def load(self) -> LoadOptions:
        return LoadOptions(
            num_gpu=self.num_gpu,
            num_thread=self.num_thread or None,  # Ollama's 0: the server's choice
            num_batch=self.num_batch,
            use_mmap=self.use_mmap,
        )


def recommended(info: ModelInfo) -> Options:
    """What the model's file recommends under `general.sampling`, as far as it can be used."""
    given = {name: info.metadata.get(f"general.sampling.{key}") for name, key in _KEYS_IN_A_FILE.items()}
    try:
        return typed(Options, given)
    except BadRequest:
        return Options()


def preset(record: ModelRecord) -> Options:
    """What the model's name adds to its file."""
    return typed(Options, record.preset.parameters)


def usable(parameters: Fields) -> dict[str, object]:
    """Those that can be options of a request, of what a stranger wrote."""
    found: dict[str, object] = {}
    for name in Options.__struct_fields__:
        with suppress(BadRequest):
            if getattr(typed(Options, {name: parameters.get(name)}), name) is not None:
                found[name] = parameters[name]
    return found


def read_options(raw: Fields) -> tuple[Options, tuple[str, ...]]:
    """Options from a request's `options`, with a warning for each unknown one. Raises BadRequest."""
    known = Options.__struct_fields__
    unknown = [name for name in raw if name not in known][:_MOST_WARNINGS]
    return typed(Options, raw, "options."), tuple(_warning(name, known) for name in unknown)


def _warning(name: str, known: tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(name[:40], known, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown option '{name[:40]}' ignored{hint}"
