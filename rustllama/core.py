"""The nouns that cross layers: what a request asks, what an engine answers, what a model is."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rustllama.errors import RustllamaError

Metadata = Mapping[str, "str | int | float | bool | list[str | int | float | bool]"]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a rendered prompt. Only trusted text (the template's own) may become special tokens."""

    text: str
    trusted: bool


class FinishReason(enum.Enum):
    STOP = "stop"  # the model ended its answer, or a stop string was met
    LENGTH = "length"  # the token limit or the context was reached
    LOAD = "load"  # nothing was asked for but that the model is loaded


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """llama.cpp's sampler chain with Ollama's defaults; `temperature` 0 is greedy, `seed` -1 is random."""

    seed: int = -1
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    temperature: float = 0.8
    repeat_last_n: int = 64  # tokens; -1 is the whole context
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What is fixed when a model's weights are loaded; None leaves the choice to the server's settings."""

    num_gpu: int | None = None  # layers on the GPU
    num_thread: int | None = None
    num_batch: int | None = None  # tokens of a prompt call
    use_mmap: bool | None = None


@dataclass(frozen=True, slots=True)
class ContextShift:
    """What a sequence may drop to go on when its context is full; places in its tokens."""

    keep: int  # those before it stay
    turns: tuple[int, ...] = ()  # where later turns begin, ascending; the last one is the last question
    question_end: int = 0  # where the last question ends; 0: there is none to keep


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. `prompt` is tokenized already and fits `num_ctx` with room for a token."""

    id: str
    prompt: tuple[int, ...]
    num_ctx: int  # bound on prompt and answer together, in tokens
    max_tokens: int | None = None  # None: as many as the context holds
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()
    reproducible: bool = False  # the same tokens, bit for bit, whatever else runs or ran
    shift: ContextShift | None = None  # None: a full context ends the answer
    owner: str = ""  # only prompts of the same owner share what was computed


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost: tokens and nanoseconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from what was computed before
    completion_tokens: int = 0
    queue_ns: int = 0
    prompt_ns: int = 0
    eval_ns: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. The last of a stream, and only it, has `finish`, `usage` if anything was computed, and may
    have warnings.
    """

    text: str
    finish: FinishReason | None = None
    usage: Usage | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is on its way into memory."""

    completed_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Queued:
    """All slots are taken."""

    position: int  # 1 gets the next slot


@dataclass(frozen=True, slots=True)
class Reading:
    """The prompt is being computed."""

    completed: int  # tokens, those that were cached among them
    total: int
    cached: int


Progress = Loading | Queued | Reading
"""What a request waits for until its first Delta."""


class Stream(Protocol):
    """The answer to one request: Deltas, the last with `finish`; or a RustllamaError instead of the rest."""

    def progress(self) -> Iterator[Progress]:
        """Comes to its end when the first Delta, or the error, is there; for those who want it, before iterating."""

    def __iter__(self) -> Iterator[Delta]: ...

    def cancel(self) -> None:
        """Ends the work on this answer in any phase; may be called more than once and after the end.

        A reader that waits gets `Cancelled`.
        """


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a model is laid out in memory."""

    n_ctx: int  # tokens of a usual slot
    n_slots: int
    size_bytes: int  # weights, KV cache and buffers
    warnings: tuple[str, ...] = ()
    plain_attention: bool = False  # without flash attention, where the setting leaves it open


@dataclass(frozen=True, slots=True)
class EngineState:
    """What `/api/ps` and `/metrics` tell of a loaded model."""

    context_length: int  # tokens of a usual slot
    slots: int
    running: int
    queued: int
    size_bytes: int  # weights, KV cache and buffers
    size_vram_bytes: int
    cells: int = 0  # tokens that the KV caches of all slots hold
    cells_used: int = 0
    decode_ms: tuple[float, ...] = ()  # of a call by its rows, from none on; 0: not measured yet
    unmeasured: int = 0  # sizes of decode calls that are to be measured, or once more


class Engine(Protocol):
    """One loaded model, as the layers above see it. All methods are called from the hub's greenlets."""

    def tokenize(
        self, spans: tuple[Span, ...], *, add_special: bool, as_written: bool = True, owner: str = ""
    ) -> tuple[int, ...]:
        """`add_special` begins with the BOS token where the vocabulary wants one and the text has none.

        `as_written`: what the model wrote before, for this owner, may become the tokens it wrote, not those its text
        gives now.
        """

    def reserve(self, num_ctx: int, available_bytes: int) -> None:
        """Makes sure that a slot of `num_ctx` tokens exists, made from that much memory. Raises OutOfMemory."""

    def check_room(self, num_ctx: int) -> None:
        """Raises Busy where `submit` would: a prompt that nobody waits for need not be tokenized."""

    def submit(self, request: GenerateRequest) -> Stream:
        """Raises Busy when the queue is full, and Unsupported for a shift that the model cannot do.

        `request.num_ctx` fits a slot (see `reserve`).
        """

    def state(self) -> EngineState: ...

    def end_all(self, reason: RustllamaError) -> None:
        """Ends every request with this error."""

    def close(self) -> None:
        """Frees everything; no request is left."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Tells whether a file is still the one that was examined."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a GGUF's header says. `metadata` leaves out long arrays (vocabulary, merges, scores)."""

    architecture: str
    parameter_count: int
    quantization: str  # like "Q4_K_M"
    size_bytes: int  # of all parts
    parts: tuple[str, ...]  # absolute paths; one, unless the file is split
    block_count: int
    context_length: int  # trained
    embedding_length: int
    head_count: int
    head_count_kv: tuple[int, ...]  # per block; 0 where a block keeps no KV cache
    key_length: int
    value_length: int
    vocabulary_size: int
    sliding_window: int = 0  # tokens; 0 is full attention
    recurrent_state_bytes: int = 0  # per sequence; 0 without recurrent blocks
    chat_template: str | None = None
    license: str | None = None
    capabilities: tuple[str, ...] = ("completion",)
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preset:
    """What a name adds to its file, like Ollama's Modelfiles: it holds where a request says nothing else."""

    template: str | None = None  # Jinja, in the place of the file's own
    system: str | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)  # options of requests, as JSON has them
    license: str | None = None
    origin: str = ""  # where the file was pulled from, like "hf.co/user/repo:Q4_K_M"; "": it is from here


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A name in the registry."""

    name: str  # as it was given
    path: str  # absolute
    modified_at: str  # RFC 3339 with fraction and zone
    digest: str  # 64 hexadecimal digits
    identity: FileIdentity
    info: ModelInfo
    preset: Preset = Preset()
