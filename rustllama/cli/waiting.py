"""The one line that tells what an answer or a load waits for: it comes late, and leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from rustllama.cli.format import clean
from rustllama.replies import Reply

SHOWN_AFTER_S = 0.5
_BAR_WIDTH = 20
_REFRESHES_PER_S = 10.0


class Waiting:
    """Drawn between `start` and `stop`, or in a `with` block, if that lasts; on a terminal only."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s = clock()
        self._reply = Reply()
        self._spinner = Spinner("dots")
        self._live = Live(
            self,
            console=console,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self) -> Waiting:
        self._since_s = self._clock()
        self._live.start()
        return self

    def stop(self, *_: object) -> None:
        """May be called more than once."""
        self._live.stop()

    __enter__, __exit__ = start, stop

    def tell(self, reply: Reply) -> None:
        """What the server says that it does meanwhile."""
        self._reply = reply

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._clock() - self._since_s >= SHOWN_AFTER_S:
            self._spinner.update(text=_line(self._reply, options.max_width - 2))
            yield self._spinner


def described(reply: Reply) -> str:
    """A line before the first word, in words; empty for any other."""
    if reply.status == "loading":
        return f"loading {clean(reply.model)} {100 * reply.completed // max(1, reply.total)} %"
    if reply.status == "queued":
        return f"waiting: {reply.position - 1} before you" if reply.position > 1 else "waiting: you are next"
    if reply.status == "prompt":
        remembered = f" ({reply.cached:,} remembered)" if reply.cached else ""
        return f"reading the prompt: {reply.completed:,} of {reply.total:,} tokens{remembered}"
    return ""


def _line(reply: Reply, width: int) -> Text:
    words = described(reply)
    bar_width = min(_BAR_WIDTH, width - len(words) - 1)
    full = bar_width * min(reply.completed, reply.total) // max(1, reply.total)
    bar = ("━" * full, "cyan"), ("─" * (bar_width - full), "dim")
    line = Text.assemble(words, " ", *bar) if reply.total else Text(words)
    line.truncate(width, overflow="ellipsis")
    return line
