"""An engine that answers what a test scripts, in the place of llama.cpp; and records of models that need no weights."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Flask
from werkzeug.test import TestResponse

from rustllama import gguf
from rustllama.api import create_app
from rustllama.bridge import Event
from rustllama.core import (
    Delta,
    EngineState,
    FinishReason,
    GenerateRequest,
    LoadOptions,
    MemoryPlan,
    ModelInfo,
    ModelRecord,
    Progress,
    Span,
    Usage,
)
from rustllama.engine.manager import EngineManager
from rustllama.engine.prefix_store import StoreState
from rustllama.engine.tally import Tally
from rustllama.errors import Busy, Cancelled, RustllamaError
from rustllama.registry import Registry
from rustllama.settings import Settings
from tests.toys import CHATML

TRAINED = 4096  # tokens


@dataclass(slots=True)
class Script:
    """What the engines of one test do; changed by the test before it sends a request."""

    pieces: tuple[str, ...] = ("Hello", " there", ".")
    breaks_at: int | None = None  # before the piece of this index: `error` is raised
    waits_at: int | None = None  # before the piece of this index: until `go` is set, or the stream is cancelled
    error: RustllamaError | None = None
    refusal: RustllamaError | None = None  # of submit
    load_error: RustllamaError | None = None
    load_waits: Event | None = None  # in the middle of a load
    progress: tuple[Progress, ...] = ()  # what a stream tells before its first piece
    go: Event = field(default_factory=Event)


class FakeStream:
    """See `core.Stream`."""

    def __init__(self, script: Script, request: GenerateRequest) -> None:
        self._script = script
        self._request = request
        self.cancelled = 0
        self.over = False

    def progress(self) -> Iterator[Progress]:
        for progress in self._script.progress:
            if self.cancelled:
                raise Cancelled
            yield progress

    def __iter__(self) -> Iterator[Delta]:
        most = self._request.max_tokens
        pieces = self._script.pieces[:most]
        for index, piece in enumerate(pieces):
            self._meet(index)
            yield Delta(piece)
        self.over = True
        reason = FinishReason.LENGTH if len(pieces) < len(self._script.pieces) else FinishReason.STOP
        yield Delta("", reason, Usage(len(self._request.prompt), 2, len(pieces), 3_000, 4_000, 5_000))

    def cancel(self) -> None:
        self.cancelled += 1
        if not self.over:
            self._script.go.set()

    def _meet(self, index: int) -> None:
        script = self._script
        if index == script.waits_at:
            script.go.wait()
        if self.cancelled:
            raise Cancelled
        if index == script.breaks_at and script.error is not None:
            raise script.error


class FakeEngine:
    """See `core.Engine`. A token is a word or a character that is none; trusted text counts in the same way."""

    def __init__(self, script: Script, record: ModelRecord, plan: MemoryPlan) -> None:
        self._script = script
        self._plan = plan
        self.record = record
        self.prompts: list[tuple[Span, ...]] = []  # all that were tokenized
        self.as_written = False  # how the last one was, and
        self.owner = ""  # for whom
        self._texts: dict[tuple[int, ...], str] = {}
        self.requests: list[GenerateRequest] = []
        self.streams: list[FakeStream] = []
        self.closed = False

    def tokenize(
        self, spans: tuple[Span, ...], *, add_special: bool, as_written: bool = True, owner: str = ""
    ) -> tuple[int, ...]:
        assert not self.closed
        self.prompts.append(spans)
        self.as_written = as_written
        self.owner = owner
        text = "".join(span.text for span in spans)
        words = re.findall(r"\w+|[^\w\s]", text)
        tokens = (1,) * add_special + tuple(zlib.crc32(word.encode()) for word in words)
        self._texts[tokens] = text
        return tokens

    def reserve(self, num_ctx: int, available_bytes: int) -> None:
        assert num_ctx <= TRAINED
        assert available_bytes

    def check_room(self, num_ctx: int) -> None:
        if isinstance(self._script.refusal, Busy):
            raise self._script.refusal

    def submit(self, request: GenerateRequest) -> FakeStream:
        assert not self.closed
        assert 0 < len(request.prompt) < request.num_ctx
        if self._script.refusal is not None:
            raise self._script.refusal
        self.requests.append(request)
        self.streams.append(FakeStream(self._script, request))
        return self.streams[-1]

    def state(self) -> EngineState:
        running = sum(not stream.over and not stream.cancelled for stream in self.streams)
        return EngineState(self._plan.n_ctx, self._plan.n_slots, running, 0, self._plan.size_bytes, 0)

    def end_all(self, reason: RustllamaError) -> None:
        self._script.error = reason

    def close(self) -> None:
        self.closed = True

    @property
    def text(self) -> str:
        """The prompt of the last request."""
        return self._texts[self.requests[-1].prompt]


@dataclass(slots=True)
class FakeKeeper:
    """What every engine factory keeps beside its engines; see `manager.EngineFactory`."""

    forgotten: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    prompt_cache_bytes: int = 0
    plain_attention: bool = False
    flushed: bool = False

    def prefers_plain_attention(self, record: ModelRecord, options: LoadOptions) -> bool:
        return self.plain_attention

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)

    def stores(self) -> tuple[StoreState, ...]:
        return ()

    def flush(self) -> None:
        self.flushed = True


@dataclass(slots=True)
class FakeEngines(FakeKeeper):
    """An engine factory that keeps what it made."""

    script: Script = field(default_factory=Script)
    made: list[FakeEngine] = field(default_factory=list)
    options: list[LoadOptions] = field(default_factory=list)

    def __call__(
        self, record: ModelRecord, options: LoadOptions, plan: MemoryPlan, tell: Callable[[float], None]
    ) -> FakeEngine:
        if self.script.load_waits is not None:
            tell(0.5)
            self.script.load_waits.wait()
        if self.script.load_error is not None:
            raise self.script.load_error
        self.options.append(options)
        self.made.append(FakeEngine(self.script, record, plan))
        return self.made[-1]

    @property
    def last(self) -> FakeEngine:
        return self.made[-1]

    @property
    def request(self) -> GenerateRequest:
        """The last one that was submitted."""
        return self.last.requests[-1]

    @property
    def stream(self) -> FakeStream:
        return self.last.streams[-1]


def fake_record(path: Path, name: str = "toy", *, chat_template: str | None = CHATML) -> ModelRecord:
    """A model whose file only has to be there."""
    path.write_bytes(b"weights of " + name.encode())
    info = ModelInfo(
        architecture="llama",
        parameter_count=1_235_814_432,
        quantization="Q8_0",
        size_bytes=path.stat().st_size,
        parts=(str(path),),
        block_count=2,
        context_length=TRAINED,
        embedding_length=64,
        head_count=4,
        head_count_kv=(2, 2),
        key_length=16,
        value_length=16,
        vocabulary_size=512,
        chat_template=chat_template,
        metadata={"general.architecture": "llama", "llama.context_length": TRAINED},
    )
    digest = f"{zlib.crc32(path.read_bytes() + (chat_template or '').encode()):064x}"
    modified_at = "2024-10-04T14:56:49.277302-07:00"
    return ModelRecord(name, str(path), modified_at, digest, gguf.identity(path), info)


@dataclass(slots=True)
class House:
    """The whole application over fake engines; the model `toy` is registered."""

    app: Flask
    registry: Registry
    engines: FakeEngines

    @property
    def script(self) -> Script:
        return self.engines.script

    @property
    def manager(self) -> EngineManager:
        manager = self.app.extensions["rustllama"]
        assert isinstance(manager, EngineManager)
        return manager

    def get(self, path: str) -> TestResponse:
        return self.app.test_client().get(path)

    def post(self, path: str, **body: object) -> TestResponse:
        return self.app.test_client().post(path, json=body)

    def send(self, path: str, data: bytes, method: str = "POST", **headers: str) -> TestResponse:
        return self.app.test_client().open(path, method=method, data=data, headers=headers)

    def chat(self, *contents: str, **fields: object) -> TestResponse:
        """Posts to `/api/chat`: the user's turn, the assistant's, the user's ..."""
        return self.post("/api/chat", **{"model": "toy", "messages": turns(*contents), **fields})

    def complete(self, *contents: str, **fields: object) -> TestResponse:
        """The same to `/v1/chat/completions`."""
        return self.post("/v1/chat/completions", **{"model": "toy", "messages": turns(*contents), **fields})


def build_house(folder: Path, **settings: Any) -> House:
    registry = Registry(folder / "rustllama.db", bundled=folder / "none.gguf")
    registry.put(fake_record(folder / "toy.gguf"))
    engines = FakeEngines()
    chosen = Settings(**{"home": folder, "memory_limit": 8 << 30, **settings})
    return House(create_app(chosen, registry=registry, engine_factory=engines), registry, engines)


def ok(response: TestResponse) -> dict[str, Any]:
    """The object of an answer that succeeded."""
    assert response.status_code == 200, response.text
    value = json.loads(response.data)
    assert isinstance(value, dict)
    return value


def refused(response: TestResponse, status: int) -> str:
    """The sentence of an answer that failed with this status, in Ollama's shape."""
    assert response.status_code == status, response.text
    error = json.loads(response.data)["error"]
    assert isinstance(error, str)
    return error


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def lines(response: TestResponse) -> list[dict[str, Any]]:
    """The objects of a streamed answer; a blank line is an error."""
    body = response.get_data()
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body[:-1].split(b"\n")]


def events(response: TestResponse) -> list[dict[str, Any]]:
    """The objects of server-sent events, without the `[DONE]` that must end them."""
    *bodies, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(body.removeprefix("data: ")) for body in bodies]
