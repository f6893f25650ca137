"""The pulls that run in this process, each shared by all who ask for it, and ended when the last of them leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

from rustllama.api.catalog import Catalog
from rustllama.api.options import usable
from rustllama.bridge import Event, NativeThreads, sampled, spawn
from rustllama.errors import InternalError, RustllamaError
from rustllama.pull.messages import Order, PullProcess
from rustllama.pull.progress import Fetched, Progress, Tell
from rustllama.pull.source import Source, parse
from rustllama.settings import Settings

_MOST_AT_ONCE = 4
_MOST_LINES = 200  # of a pull; when there are more, the last one changes


class Pulls:
    """Called from the hub's greenlets."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        self._running: dict[tuple[str, str], Pull] = {}

    def source(self, text: str) -> Source:
        """Raises BadRequest."""
        return parse(text, registry=self._settings.registry)

    @contextmanager
    def shared(self, text: str, name: str) -> Iterator[Pull]:
        """The pull from there that makes the model `name`; it begins with the first who wants it."""
        key = (text.strip(), name)
        pull = self._running.get(key)
        if pull is None:
            pull = self._running[key] = self._begun(text, name)
        pull.users += 1
        try:
            yield pull
        finally:
            pull.users -= 1
            if not pull.users:
                del self._running[key]
                pull.end()

    def _begun(self, text: str, name: str) -> Pull:
        settings = self._settings
        order = Order(text, str(settings.models_path), settings.registry, settings.beyond_loopback)
        process = PullProcess(order)

        def work(tell: Tell) -> None:
            fetched: Fetched = self._threads.call(process.run, tell)
            tell(Progress("proving the model"))
            preset = replace(fetched.preset, parameters=usable(fetched.preset.parameters))
            self._catalog.adopt(name, Fetched(fetched.paths, preset))

        pull = Pull(work, process.end)
        spawn(pull.run)
        return pull

    @cached_property
    def _threads(self) -> NativeThreads:
        return NativeThreads(_MOST_AT_ONCE)


class Pull:
    """One on its way, as all who wait for it see it."""

    def __init__(self, work: Callable[[Tell], None], end: Callable[[], None]) -> None:
        self.users = 0
        self.end = end
        self._work = work
        self._lines: list[Progress] = []
        self._over = Event()
        self._failure: RustllamaError | None = InternalError("The pull came to no end: the log says more.")

    def run(self) -> None:
        try:
            self._work(self._tell)
            self._failure = None
        except RustllamaError as error:
            self._failure = error
        finally:
            self._over.set()

    def progress(self, leaving: Callable[[], None]) -> Iterator[Progress]:
        """Each line, and what has changed of the last one, until the model is there; `leaving` may raise meanwhile.

        Raises RustllamaError: why it will not be.
        """
        told: tuple[Progress, ...] = ()
        for lines in sampled(self._waited(leaving), lambda: tuple(self._lines)):
            changed = bool(told) and lines[len(told) - 1] != told[-1]
            yield from lines[len(told) - changed :]
            told = lines
        if self._failure is not None:
            raise self._failure

    def _waited(self, leaving: Callable[[], None]) -> Callable[[float], object]:
        def over(timeout_s: float) -> object:
            leaving()
            return self._over.wait(timeout_s)

        return over

    def _tell(self, progress: Progress) -> None:
        """In any thread."""
        lines = self._lines
        if lines and (lines[-1].status == progress.status or len(lines) >= _MOST_LINES):
            lines[-1] = progress
        else:
            lines.append(progress)
