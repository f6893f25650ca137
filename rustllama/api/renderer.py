"""Renders chat templates where they can do no harm: the usual one here, strangers' in helper processes.

There are two helpers, so that who waits for a template that takes its time is who brought it: one for the templates of
models, and one for those that requests bring and those of models that were too slow the last time.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache

from rustllama import bridge
from rustllama.core import Span
from rustllama.errors import Busy, RustllamaError, TemplateRefused, TemplateTooCostly
from rustllama.template_helper import TemplateHelper
from rustllama.templates import ChatTemplate, Messages, TemplateSource

_KEPT_TEMPLATES = 16
_KEPT_COSTLY = 256
_MOST_FAILURES = 2  # in a row, until a template rests
_REST_S = 60.0
_CHECKED_BYTES = 1 << 20
_LONGEST_WAIT_S = 10.0  # for a turn; those before it take at most 2 s each

Rendered = tuple[tuple[Span, ...], ...]


@dataclass(frozen=True, slots=True)
class _Costly:
    """A template that was too slow the last time, or ended its process."""

    failures: int
    rests_until_s: float


class Renderer:
    """One for the process. All methods are called from greenlets of its hub."""

    def __init__(
        self,
        helper: Callable[[], TemplateHelper] = TemplateHelper,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        patience_s: float = _LONGEST_WAIT_S,
    ) -> None:
        """Starts nothing: a helper's process starts when it is expected to be needed."""
        self._of_models, self._of_others = _Lane(helper(), patience_s), _Lane(helper(), patience_s)
        self._clock_s = clock_s
        self._compiled = lru_cache(_KEPT_TEMPLATES)(ChatTemplate.compiled)
        self._costly: OrderedDict[bytes, _Costly] = OrderedDict()

    def start(self) -> None:
        """Starts the helper for the templates of models, without waiting for it."""
        self._of_models.start()

    def expect(self, source: TemplateSource, *, brought: bool) -> None:
        """Starts the helper that `render` will need, without waiting for it."""
        if not source.is_harmless:
            self._lane(source, brought).start()

    def check(self, template: str) -> None:
        """Raises TemplateRefused for what is no chat template, and what else `render` raises."""
        question = [{"role": "user", "content": "hello"}]
        self.render(TemplateSource.alone(template), [question], brought=True, limit_bytes=_CHECKED_BYTES)

    def render(
        self, source: TemplateSource, conversations: Sequence[Messages], *, brought: bool, limit_bytes: int
    ) -> Rendered:
        """A prompt for each conversation. `brought`: by the request, in the place of the model's own template.

        Raises TemplateRefused, also for one with more than `limit_bytes` of text, and Busy.
        """
        if source.is_harmless:
            return bridge.offload(lambda: tuple(map(self._compiled(source).render, conversations)))
        # shielded: the helper must have ended with one order before it gets another
        return bridge.shielded(lambda: self._in_turn(source, conversations, brought, limit_bytes))

    def _lane(self, source: TemplateSource, brought: bool) -> _Lane:
        return self._of_others if brought or source.key in self._costly else self._of_models

    def _in_turn(
        self, source: TemplateSource, conversations: Sequence[Messages], brought: bool, limit_bytes: int
    ) -> Rendered:
        lane = self._lane(source, brought)
        with lane.turn():
            if lane is self._lane(source, brought):
                return self._render(lane.helper, source, conversations, limit_bytes)
        return self._in_turn(source, conversations, brought, limit_bytes)  # it was too slow meanwhile

    def _render(
        self, helper: TemplateHelper, source: TemplateSource, conversations: Sequence[Messages], limit_bytes: int
    ) -> Rendered:
        before = self._costly.get(source.key, _Costly(0, 0.0))
        if self._clock_s() < before.rests_until_s:
            raise TemplateRefused(
                f"The chat template was ended {_MOST_FAILURES} times in a row, as it took too long: "
                f"use another template, or try again in {_REST_S:g} s."
            )
        try:
            prompts = bridge.offload(helper.render, source, conversations, limit_bytes=limit_bytes)
        except TemplateTooCostly:
            failures = before.failures + 1
            rests_until_s = self._clock_s() + _REST_S if failures >= _MOST_FAILURES else 0.0
            self._note(source, _Costly(failures, rests_until_s))
            raise
        self._costly.pop(source.key, None)
        return prompts

    def _note(self, source: TemplateSource, costly: _Costly) -> None:
        self._costly[source.key] = costly
        self._costly.move_to_end(source.key)
        if len(self._costly) > _KEPT_COSTLY:
            self._costly.popitem(last=False)


class _Lane:
    """A helper, and those who wait for their turn with it."""

    def __init__(self, helper: TemplateHelper, patience_s: float) -> None:
        self.helper = helper
        self._patience_s = patience_s
        self._lock = bridge.RLock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """First come, first served. Raises Busy."""
        if not self._lock.acquire(timeout=self._patience_s):
            raise Busy("Too many requests wait for slow chat templates: try again in a moment.")
        try:
            yield
        finally:
            self._lock.release()

    def start(self) -> None:
        if self.helper.pid is None:
            bridge.spawn(self._start)

    def _start(self) -> None:
        with suppress(RustllamaError), self.turn():  # who renders then is told why it does not start
            bridge.offload(self.helper.start)
