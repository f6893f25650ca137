"""A running answer and what it holds: the lease of its model, its stream, the watch on its client."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from rustllama.api.access import Call, call_of
from rustllama.api.catalog import Catalog
from rustllama.api.jobs import Job
from rustllama.api.options import preset, recommended
from rustllama.api.prompts import Prompt, Prompts
from rustllama.bridge import watch_client
from rustllama.core import Delta, FinishReason, GenerateRequest, Loading, ModelRecord, Progress
from rustllama.engine.lease import Lease
from rustllama.engine.manager import EngineManager
from rustllama.engine.tally import Tally
from rustllama.errors import Cancelled, RustllamaError, Unsupported
from rustllama.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

Work = Generator[Delta | Progress, None, None]


class Answer:
    """Iterated once: for Progress, where the job asks for it, and for Deltas. `close` ends the work in any phase and
    gives everything back, exactly once.
    """

    def __init__(self, job: Job, call: Call, work: Callable[[Job, Answer], Work]) -> None:
        """`work` puts into `held` what has to be given back."""
        self.model = job.model
        self.call = call
        self.load_ns = 0
        self.warnings = job.warnings
        self.truncated_messages = 0
        self.held = ExitStack()
        self._watch = ExitStack()
        self._work = work(job, self)
        self._events: Iterator[Delta | Progress] = self._work
        self._over = False

    def begin(self, environ: WSGIEnvironment) -> None:
        """Returns when the first event is there, so that early errors still get a status."""
        self._watch.enter_context(watch_client(environ))
        self._events = chain((next(self._work),), self._work)

    def __iter__(self) -> Iterator[Delta | Progress]:
        try:
            for event in self._events:
                if isinstance(event, Delta) and event.finish is not None:
                    self.call.usage, self.call.outcome = event.usage, event.finish.value
                    self.warnings += event.warnings
                    self._over = True
                    self.close()  # before the last piece goes out: a client that has it may leave at once
                yield event
        except RustllamaError as error:
            self._over = True
            self.call.failed(error)
            raise

    def close(self) -> None:
        if not self._over:
            self._over = True
            self.call.failed(Cancelled)
        self._watch.close()  # first, so that nothing interrupts the giving back
        self._work.close()
        self.held.close()


class Answers:
    """Starts the work that a Job asks for."""

    def __init__(
        self, catalog: Catalog, manager: EngineManager, prompts: Prompts, tally: Tally, settings: Settings
    ) -> None:
        self._catalog = catalog
        self._manager = manager
        self._prompts = prompts
        self._tally = tally
        self._settings = settings

    def start(self, job: Job, environ: WSGIEnvironment) -> Answer:
        """Returns with the first event of the answer. Raises what can go wrong until then."""
        call = call_of(environ)
        if call.key is not None and not self._settings.share_prompts:
            job = replace(job, owner=call.key.name)
        answer = Answer(job, call, self._work)
        with ExitStack() as undo:
            undo.callback(answer.close)
            answer.begin(environ)
            undo.pop_all()
        return answer

    def unload(self, job: Job, environ: WSGIEnvironment) -> None:
        call, record = call_of(environ), self._catalog.get(job.model)
        call.model, call.outcome = record.name, "unload"
        self._manager.unload(record, forget=job.forget)

    def _work(self, job: Job, answer: Answer) -> Work:
        """Loads the model, prepares the prompt, generates."""
        record = self._record(job, answer.call)
        job = self._completed(job, record)
        self._prompts.expect(job, record)
        lease = answer.held.enter_context((yield from self._lease(job, record)))
        answer.load_ns = lease.load_ns
        answer.warnings += lease.warnings
        if job.is_empty:
            yield Delta("", FinishReason.LOAD)
            return
        lease.engine.check_room(lease.num_ctx)
        prompt = self._prompts.build(job, record, lease.engine, lease.num_ctx)
        answer.warnings += prompt.warnings
        answer.truncated_messages = prompt.truncated_messages
        stream = lease.engine.submit(_request(answer.call.id, job, record, prompt, lease.num_ctx))
        answer.held.callback(stream.cancel)
        if job.progress:
            yield from stream.progress()
        deltas = iter(stream)
        first = next(deltas)
        if first.usage is None or first.usage.completion_tokens:  # else its time was up before it had one
            answer.call.first_token_ns = answer.call.elapsed_ns
            self._tally.models[lease.loaded_as].first_token.observe(answer.call.first_token_ns)
        yield first
        yield from deltas

    def _record(self, job: Job, call: Call) -> ModelRecord:
        record = self._catalog.current(job.model)
        call.model = record.name
        if "completion" not in record.info.capabilities:
            raise Unsupported(f'"{job.model}" does not support chat: it is made for embeddings.', "model")
        return record

    def _completed(self, job: Job, record: ModelRecord) -> Job:
        """The request's own before what the name adds, before the settings."""
        job = job.completed(preset(record), record.preset.system)
        if job.options.reproducible is None:
            job = replace(job, options=msgspec.structs.replace(job.options, reproducible=self._settings.reproducible))
        return job

    def _lease(self, job: Job, record: ModelRecord) -> Generator[Loading, None, Lease]:
        options = job.options
        return self._manager.acquiring(
            record,
            options.load(),
            num_ctx=options.num_ctx,
            keep_alive_s=job.keep_alive_s,
            progress=job.progress,
        )


_MOST_CONTEXTS = 10  # of an answer that may go on in a full context, where the request names no bound; Ollama's too


def _request(id: str, job: Job, record: ModelRecord, prompt: Prompt, num_ctx: int) -> GenerateRequest:
    return GenerateRequest(
        id=id,
        prompt=prompt.tokens,
        num_ctx=num_ctx,
        max_tokens=job.options.max_tokens or (_MOST_CONTEXTS * num_ctx if prompt.shift else None),
        stop=job.options.stops,
        sampling=job.options.sampling(recommended(record.info)),
        reproducible=bool(job.options.reproducible),
        shift=prompt.shift,
        owner=job.owner,
    )
