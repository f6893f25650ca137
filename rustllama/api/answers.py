"""A running answer and what it holds: the lease of its model, its stream, the watch on its client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from rustllama.api.access import Call, call_of
from rustllama.api.catalog import Catalog
from rustllama.api.jobs import Job
from rustllama.api.options import recommended
from rustllama.api.prompts import Prompt, Prompts
from rustllama.bridge import watch_client
from rustllama.core import Delta, GenerateRequest, ModelRecord, Stream
from rustllama.engine.manager import EngineManager, Lease
from rustllama.engine.tally import Tally
from rustllama.errors import Cancelled, RustllamaError, Unsupported

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Answer:
    """Iterated once for its Deltas. `close` ends the work in any phase and gives everything back, exactly once.

    Made when the first Delta is there, so that early errors still get a status.
    """

    def __init__(self, job: Job, call: Call, lease: Lease, prompt: Prompt, stream: Stream) -> None:
        self.model = job.model
        self.call = call
        self.load_ns = lease.load_ns
        self.warnings = job.warnings + lease.warnings + prompt.warnings
        self.truncated_messages = prompt.truncated_messages
        self._held = ExitStack()
        deltas = iter(stream)
        first = next(deltas)
        call.first_token_ns = call.elapsed_ns
        self._deltas = chain((first,), deltas)
        self._over = False

    def hold(self, held: ExitStack, watch: ExitStack) -> None:
        """Makes both this answer's own; the watch closes first, so that nothing interrupts the giving back."""
        self._held = held.pop_all()
        self._held.enter_context(watch.pop_all())

    def __iter__(self) -> Iterator[Delta]:
        try:
            for delta in self._deltas:
                if delta.finish is not None:
                    self.call.usage, self.call.outcome = delta.usage, delta.finish.value
                    self._over = True
                    self.close()  # before the last piece goes out: a client that has it may leave at once
                yield delta
        except RustllamaError as error:
            self._over = True
            self.call.failed(error)
            raise

    def close(self) -> None:
        if not self._over:
            self._over = True
            self.call.failed(Cancelled)
        self._held.close()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of a Job without a prompt."""

    done_reason: str
    load_ns: int = 0
    warnings: tuple[str, ...] = ()


class Answers:
    """Starts the work that a Job asks for."""

    def __init__(self, catalog: Catalog, manager: EngineManager, tally: Tally, *, reproducible: bool) -> None:
        """`reproducible` where a request does not say."""
        self._catalog = catalog
        self._manager = manager
        self._tally = tally
        self._reproducible = reproducible
        self._prompts = Prompts()

    def start(self, job: Job, environ: WSGIEnvironment) -> Answer:
        """Returns with the first piece of the answer. Raises what can go wrong until then."""
        call = call_of(environ)
        if job.options.reproducible is None:
            job = replace(job, options=msgspec.structs.replace(job.options, reproducible=self._reproducible))
        with ExitStack() as held, ExitStack() as watch:
            watch.enter_context(watch_client(environ))
            lease, record = self._acquire(job, call)
            held.enter_context(lease)
            prompt = self._prompts.build(job, record, lease.engine, lease.num_ctx)
            stream = lease.engine.submit(_request(call.id, job, record, prompt, lease.num_ctx))
            held.callback(stream.cancel)
            answer = Answer(job, call, lease, prompt, stream)
            answer.hold(held, watch)
        self._tally.models[lease.loaded_as].first_token.observe(call.first_token_ns)
        return answer

    def load(self, job: Job, environ: WSGIEnvironment) -> Loaded:
        """Loads the model, or unloads it where `keep_alive` is 0."""
        call = call_of(environ)
        if job.keep_alive_s == 0:
            record = self._catalog.get(job.model)
            call.model, call.outcome = record.name, "unload"
            self._manager.unload(record, forget=job.forget)
            return Loaded("unload")
        with watch_client(environ):
            lease, _ = self._acquire(job, call)
            call.outcome = "load"
            with lease:
                return Loaded("load", lease.load_ns, job.warnings + lease.warnings)

    def _acquire(self, job: Job, call: Call) -> tuple[Lease, ModelRecord]:
        record = self._catalog.current(job.model)
        call.model = record.name
        if "completion" not in record.info.capabilities:
            raise Unsupported(f'"{job.model}" does not support chat: it is made for embeddings.', "model")
        options = job.options
        lease = self._manager.acquire(record, options.load(), num_ctx=options.num_ctx, keep_alive_s=job.keep_alive_s)
        return lease, record


def _request(id: str, job: Job, record: ModelRecord, prompt: Prompt, num_ctx: int) -> GenerateRequest:
    return GenerateRequest(
        id=id,
        prompt=prompt.tokens,
        num_ctx=num_ctx,
        max_tokens=job.options.max_tokens,
        stop=job.options.stops,
        sampling=job.options.sampling(recommended(record.info)),
        reproducible=bool(job.options.reproducible),
    )
