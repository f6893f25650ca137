"""How an answer reaches the screen: Markdown that grows block by block on a terminal, plain text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import IO, ClassVar, Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from rustllama.cli.format import clean
from rustllama.cli.waiting import Waiting
from rustllama.replies import Reply

REFRESH_S = 0.1  # the least time between two drawings of what is still growing

# Without the rules that would hide a part of the text: HTML, link definitions, the address of an image.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable(["reference", "image"])


def note(console: Console, text: str) -> None:
    """A remark of rustllama's own, dimmed."""
    console.print(Text(clean(text), style="dim"))


def answer_on(console: Console) -> Answer:
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveAnswer(console)
    return PlainAnswer(console.file)


class Answer(Protocol):
    """An answer that is being shown; leaving the `with` block completes it, however it ended."""

    def __enter__(self) -> Answer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def waits(self, reply: Reply) -> None:
        """Before the first piece: a line that tells why it does not come yet."""

    def feed(self, piece: str) -> None: ...


class PlainAnswer:
    """The text as it comes, flushed piece by piece, ended by a newline."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._last = "\n"

    def __enter__(self) -> PlainAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last != "\n":
            self.feed("\n")

    def waits(self, reply: Reply) -> None:
        pass

    def feed(self, piece: str) -> None:
        text = clean(piece)
        self._last = text[-1:] or self._last
        self._file.write(text)
        self._file.flush()


class LiveAnswer:
    """What it waits for until the first piece, then Markdown.

    Blocks are printed for good once the next one has begun. Only the last, unfinished one is drawn again as it grows,
    no more of it than fits the screen, so a long answer neither flickers nor is cut.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._tail = ""
        self._printed = False
        self._drawn_at = -REFRESH_S
        self._waiting = Waiting(console, clock)
        self._live = Live(
            console=console,
            get_renderable=self._window,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="visible",
        )

    def __enter__(self) -> LiveAnswer:
        self._waiting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.stop()
        self._live.stop()
        for block in split_blocks(self._tail):
            self._print(block)

    def waits(self, reply: Reply) -> None:
        self._waiting.tell(reply)

    def feed(self, piece: str) -> None:
        if not self._live.is_started:
            self._waiting.stop()
            self._live.start()
        self._tail += clean(piece)
        if "\n" in piece:
            self._print_finished()
        if self._clock() - self._drawn_at >= REFRESH_S:
            self._drawn_at = self._clock()
            self._live.refresh()

    def _print_finished(self) -> None:
        lines, _, unfinished = self._tail.rpartition("\n")  # which may still become anything
        *finished, last = split_blocks(lines)
        self._tail = f"{last}\n{unfinished}"
        for block in finished:
            self._print(block)

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(_Block(text, after=self._printed), end="")
            self._printed = True

    def _window(self) -> RenderableType:
        height = self._console.height - 1
        lines = self._tail.strip("\n").split("\n")
        if len(lines) > height:
            fence = lines[:1] if lines[0].startswith(("```", "~~~")) else []
            lines = fence + lines[-height:]
        return _Block("\n".join(lines), after=self._printed, height=height)


def split_blocks(text: str) -> list[str]:
    """The top-level Markdown blocks of a text, at least one; joined by newlines they are the text again."""
    lines = text.split("\n")
    begins = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
    return ["\n".join(lines[begin:end]) for begin, end in pairwise([0, *begins[1:], len(lines)])]


class _Code(CodeBlock):
    """Code in the terminal's own colours, without padding: it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(
            str(self.text).rstrip(), self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True
        )


class _Markdown(Markdown):
    """Markdown that hides nothing and keeps the line breaks it was given."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "fence": _Code, "code_block": _Code}

    def __init__(self, text: str) -> None:
        super().__init__("", justify="default", hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class _Block:
    """Markdown's lines without the blank ones around them and the spaces behind them; at most the last `height`."""

    def __init__(self, text: str, *, after: bool, height: int = 0) -> None:
        self._markdown = _Markdown(text)
        self._after = after  # another block: a blank line goes between
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [_trimmed(line) for line in console.render_lines(self._markdown, options, pad=False)]
        full = [number for number, line in enumerate(lines) if line]
        lines = [[]] * self._after + lines[full[0] : full[-1] + 1] if full else []
        for line in lines[-self._height :]:
            yield from line
            yield Segment.line()


def _trimmed(line: list[Segment]) -> list[Segment]:
    while line and not line[-1].text.strip():
        line.pop()
    return [*line[:-1], line[-1]._replace(text=line[-1].text.rstrip())] if line else line
