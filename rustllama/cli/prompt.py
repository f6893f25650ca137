"""What the user types: prompt_toolkit with history, completion and texts of several lines."""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Callable, Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from rustllama.cli.chat import Chat
from rustllama.cli.commands import COMMANDS, PARAMETERS, is_open

_PARAMETER = "/set parameter "


def reader(chat: Chat) -> Callable[[], str]:
    """A function that asks the user; it raises EOFError on Ctrl+D and KeyboardInterrupt on Ctrl+C."""
    session: PromptSession[str] = PromptSession(
        ">>> ",
        history=_history(chat),
        completer=_Completer(),
        complete_while_typing=False,
        multiline=Condition(lambda: is_open(get_app().current_buffer.text)),
        prompt_continuation="... ",
    )
    return session.prompt


class _Completer(Completer):
    """Slash commands, and the names of parameters behind theirs."""

    def get_completions(self, document: Document, _: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        words = [command.words for command in COMMANDS]
        if typed.startswith(_PARAMETER):
            words = [_PARAMETER + name for name in PARAMETERS]
        yield from (Completion(word, -len(typed)) for word in words if typed and word.startswith(typed))


def _history(chat: Chat) -> History:
    try:
        return _FileHistory(chat)
    except OSError:  # a state folder that cannot be written costs the history alone
        return InMemoryHistory()


class _FileHistory(FileHistory):
    """Kept in the state folder, unless the chat keeps no history."""

    def __init__(self, chat: Chat) -> None:
        super().__init__(chat.home.file("history"))
        self._chat = chat

    def store_string(self, string: str) -> None:
        if self._chat.keeps_history:
            with contextlib.suppress(OSError):
                super().store_string(string)


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keeps what is typed meanwhile off the screen and for the next prompt."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = before.copy()
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
