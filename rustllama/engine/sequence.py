"""One request on its way through the engine: its tokens, its place, its answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from rustllama.core import ContextShift, Delta, FinishReason, GenerateRequest, Reading, Usage
from rustllama.engine import context_shift
from rustllama.engine.detokenizer import Detokenizer
from rustllama.engine.drafts import Drafter
from rustllama.engine.states import WORTH_REUSING, Tokens, as_tokens, whole_chunks
from rustllama.engine.tally import ModelTally, Source

_TIME_IS_UP = "the answer ends here: it reached the time limit of the server (RUSTLLAMA_REQUEST_TIMEOUT)"


class Phase(enum.Enum):
    QUEUED = "queued"  # has no slot
    PREFILL = "prefill"  # a part of the prompt is still to be computed
    DECODE = "decode"  # each step gives a token
    ENDED = "ended"  # its slot is cleared by the next plan


class Outlet(Protocol):
    """Where the answer goes; an exception ends it."""

    def put(self, item: Delta | Exception) -> None: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Changed by the hub while no step runs, and by the native thread during a step."""

    request: GenerateRequest
    outlet: Outlet
    arrived_ns: int
    phase: Phase = Phase.QUEUED
    cancelled: bool = False  # set at any time, and never reset
    expired: bool = False  # likewise: its time is up, and the next token is the last one
    tokens: list[int] = field(default_factory=list)  # prompt and answer, less what was dropped
    computed: int = 0  # how many of the tokens llama.cpp's memory holds
    cached: int = 0  # how many of them came from what was computed before
    source: Source = Source.COMPUTED  # of those that came so
    dropped: int = 0  # tokens that left a full context; its state is then of no use to others
    shift: ContextShift | None = None  # what may be dropped next
    order: int = 0  # of admission
    admitted_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    detokenizer: Detokenizer = field(default_factory=Detokenizer)
    drafter: Drafter | None = None  # where its state can be cut behind what did not come true
    prompt: Tokens = field(default_factory=lambda: as_tokens(()))
    opening: bytes = b""  # owner and first tokens of the prompt: those with another have nothing to share
    tally: ModelTally = field(default_factory=ModelTally)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.prompt = as_tokens(self.request.prompt)
        self.opening = self.request.owner.encode() + b"\0" + self.prompt[:WORTH_REUSING].tobytes()
        self.detokenizer = Detokenizer(self.request.stop)
        self.shift = self.request.shift

    @property
    def over(self) -> bool:
        return self.cancelled or self.phase is Phase.ENDED

    @property
    def transcript(self) -> Tokens:
        """The prompt, and the answer too once the sequence is over."""
        return as_tokens(self.tokens) if self.over else self.prompt

    @property
    def exact(self) -> int:
        """How many of the first tokens are computed, or will be, in calls of EXACT_CHUNK."""
        return whole_chunks(len(self.request.prompt)) if self.request.reproducible else 0

    @property
    def prompt_remaining(self) -> int:
        return len(self.request.prompt) - self.computed

    @property
    def room(self) -> int:
        """Tokens that may still be generated before the answer ends or its context is full."""
        limit = self.request.max_tokens
        left = self.request.num_ctx - len(self.tokens)
        return left if limit is None else min(left, limit - self.answered)

    @property
    def reading(self) -> Reading | None:
        """None before it has a slot."""
        total = len(self.request.prompt)
        return None if self.phase is Phase.QUEUED else Reading(min(self.computed, total), total, self.cached)

    @property
    def answered(self) -> int:
        """Tokens generated, an end-of-generation token included."""
        return len(self.tokens) + self.dropped - len(self.request.prompt)

    @property
    def is_full(self) -> bool:
        """Its context has no place for the last token: `make_room` comes before the next decode."""
        return len(self.tokens) > self.request.num_ctx

    def make_room(self) -> tuple[int, int]:
        """Drops tokens and returns the places where they were; llama.cpp's memory has to follow."""
        assert self.shift is not None, "a full context without a shift ends the answer"
        start, end = context_shift.cut(self.shift, self.computed)
        self.shift = context_shift.after(self.shift, start, end)
        del self.tokens[start:end]
        self.computed -= end - start
        self.dropped += end - start
        if self.drafter is not None:
            self.drafter = Drafter(self.tokens, self.drafter.trust)
        return start, end

    def accept(self, token: int, piece: bytes | None, now_ns: int) -> Delta:
        """Takes a sampled token; `piece` None is the end of the generation. Returns what the client may see now."""
        self._count(now_ns)
        self.last_token_ns = now_ns
        self.tokens.append(token)
        if self.drafter is not None:
            self.drafter.follow()
        text = "" if piece is None else self.detokenizer.push(piece)
        finish = self._finish(piece is None)
        if finish is None:
            return Delta(text)
        self.phase = Phase.ENDED
        return Delta(text + self.detokenizer.flush(), finish, self.usage(), self._warnings(finish))

    def expire(self, now_ns: int) -> Delta | None:
        """Its time is up: the whole answer where no token is there yet, else None, as the next token will end it."""
        self.expired = True
        if self.phase is Phase.DECODE:
            return None
        self.cancelled = True
        self.admitted_ns = self.admitted_ns or now_ns
        self.first_token_ns = self.last_token_ns = now_ns
        return Delta("", FinishReason.LENGTH, self.usage(), self._warnings(FinishReason.LENGTH))

    def _count(self, now_ns: int) -> None:
        self.tally.answer_tokens += 1
        if not self.first_token_ns:
            self.first_token_ns = now_ns
            self.tally.prompts[self.source if self.cached else Source.COMPUTED] += 1
            self.tally.prompt_tokens[self.source] += self.cached
        elif now_ns != self.last_token_ns:  # a draft that came true comes with the token before it
            self.tally.gaps.observe(now_ns - self.last_token_ns)

    def _finish(self, ended: bool) -> FinishReason | None:
        if ended or self.detokenizer.stopped:
            return FinishReason.STOP
        full = self.shift is None and len(self.tokens) >= self.request.num_ctx
        limit = self.request.max_tokens
        enough = self.expired or (limit is not None and self.answered >= limit)
        return FinishReason.LENGTH if full or enough else None

    def _warnings(self, finish: FinishReason) -> tuple[str, ...]:
        told = []
        if self.dropped:
            told.append(f"{self.dropped} tokens were dropped to go on in a context of {self.request.num_ctx}")
        if self.expired and finish is FinishReason.LENGTH:
            told.append(_TIME_IS_UP)
        return tuple(told)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached,
            completion_tokens=self.answered,
            queue_ns=self.admitted_ns - self.arrived_ns,
            prompt_ns=self.first_token_ns - self.admitted_ns,
            eval_ns=self.last_token_ns - self.first_token_ns,
        )
