"""One measured run against a server: prompts to measure, a warm-up, the run, and what it showed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from rustllama.bench.dialects import DIALECTS, Dialect
from rustllama.bench.player import Address, Arrivals, Player, Recording
from rustllama.bench.prompts import PromptMaker
from rustllama.bench.report import Figures, Intrusion, figures, intrusion
from rustllama.bench.trace import Trace
from rustllama.bench.wire import http_request, read
from rustllama.errors import BadRequest, Unavailable

INTRUDER_ANSWER_TOKENS = 4  # only the first matters, unless it has no text of its own
DEFAULT_URLS = {"ollama": "http://localhost:11434", "openai": "http://localhost:8080"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask of which server. Lengths are tokens."""

    url: str
    seed: int
    api: str = "rustllama"
    api_key: str = ""  # sent if there is one
    model: str = "demo"
    concurrency: int = 1
    requests: int = 1
    prompt_tokens: int = 128
    answer_tokens: int = 128
    rate: float | None = None  # requests a second; None: a closed loop
    shared_prefix: int = 0
    warmup: int = 1
    intrude: int | None = None  # length of one more prompt, which arrives among the running answers
    leave: int = 0  # how many of the requests hang up in the middle of their answer


@dataclass(slots=True)
class LoadRun:
    """Runs a plan once."""

    plan: Plan
    _address: Address = field(init=False)
    _dialect: Dialect = field(init=False)
    _prompts: PromptMaker = field(init=False)
    _made: int = 0

    def __post_init__(self) -> None:
        """Raises ServerUnreachable, BadRequest, and Unavailable where the server refuses even a short request."""
        url = urlsplit(self.plan.url)
        if url.scheme != "http" or not url.hostname:
            raise BadRequest(f"{self.plan.url!r} is no address of the form http://host:port.", field="url")
        self._address = Address.find(url.hostname, url.port or 80)
        self._dialect = DIALECTS[self.plan.api]
        self._prompts = PromptMaker.calibrate(self._count_tokens, self.plan.seed)

    def measure(self) -> tuple[Figures, Intrusion | None]:
        plan = self.plan
        self._play([self._recording(plan.prompt_tokens) for _ in range(plan.warmup)], Arrivals(plan.concurrency))
        recordings = [self._recording(plan.prompt_tokens) for _ in range(plan.requests)]
        for recording in recordings[: plan.leave]:
            recording.leaves_after = max(1, plan.answer_tokens // 2)
        arrivals = Arrivals(plan.concurrency, plan.rate, plan.seed)
        if plan.intrude is None:
            return figures(self._play(recordings, arrivals)), None
        [alone] = self._play([self._recording(plan.intrude, INTRUDER_ANSWER_TOKENS)], Arrivals())
        intruder = self._recording(plan.intrude, INTRUDER_ANSWER_TOKENS)
        others = self._play(recordings, arrivals, intruder)
        among = read(intruder, self._dialect)
        found = figures(others)
        failed = {trace.error: 1 for trace in (alone, among) if trace.error}
        return replace(found, errors={**found.errors, **failed}), intrusion(alone, among, others)

    def _play(self, recordings: list[Recording], arrivals: Arrivals, intruder: Recording | None = None) -> list[Trace]:
        Player(self._address).play(recordings, arrivals, intruder)
        return [read(recording, self._dialect) for recording in recordings]

    def _recording(self, prompt_tokens: int, answer_tokens: int | None = None) -> Recording:
        self._made += 1
        prompt = self._prompts.make(self._made, prompt_tokens, self.plan.shared_prefix)
        return self._ask(prompt, answer_tokens or self.plan.answer_tokens)

    def _ask(self, prompt: str, answer_tokens: int) -> Recording:
        body = self._dialect.body(self.plan.model, prompt, answer_tokens)
        host = urlsplit(self.plan.url).netloc
        return Recording(http_request(host, self._dialect.path, body, self.plan.api_key))

    def _count_tokens(self, prompt: str) -> int:
        [trace] = self._play([self._ask(prompt, 1)], Arrivals())
        if trace.error:
            raise Unavailable(f"{self.plan.url} refused a short request: {trace.error}.")
        if trace.prompt_tokens is None:
            raise BadRequest(f"{self.plan.url} does not say how many tokens a prompt has.", field="api")
        return trace.prompt_tokens
