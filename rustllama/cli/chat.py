"""A conversation with a model: what was said, and the loop that goes on with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from rustllama.cli.format import one_line
from rustllama.cli.home import Home
from rustllama.cli.pick import pick_model
from rustllama.cli.render import answer_on, note
from rustllama.cli.waiting import Waiting
from rustllama.client import Client
from rustllama.errors import AnswerLost, RustllamaError
from rustllama.replies import Message, Reply


@dataclass(slots=True)
class Chat:
    """One conversation. Answers go to `out`; everything that rustllama itself says goes to `notes`."""

    client: Client
    model: str
    out: Console
    notes: Console
    home: Home
    verbose: bool = False
    keeps_history: bool = True
    system: str = ""
    options: dict[str, object] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Shows the answer to `text`. What was said of it stays in the conversation, also where it is stopped.

        An answer that the server lost leaves nothing there, not even the question: it can be asked again.
        """
        self.messages.append(Message("user", text))
        said: list[str] = []
        try:
            self._answer(said)
        except AnswerLost:
            said.clear()
            raise
        finally:
            if said:
                self.messages.append(Message("assistant", "".join(said)))
            else:
                self.messages.pop()

    def _answer(self, said: list[str]) -> None:
        system = [Message("system", self.system)] if self.system else []
        started_s = first_s = time.monotonic()
        reply = Reply()
        stream = self.client.chat(self.model, [*system, *self.messages], self.options)
        with answer_on(self.out) as answer, closing(stream) as replies:
            for reply in replies:
                if reply.message.content:
                    first_s = first_s if said else time.monotonic()
                    said.append(reply.message.content)
                    answer.feed(reply.message.content)
                elif reply.status:
                    answer.waits(reply)
        self._warn(reply)
        if self.verbose:
            note(self.notes, rates(reply, first_s - started_s))

    def load(self, given: str | None) -> None:
        """Goes on with another model, by name or path; the conversation stays. Raises RustllamaError."""
        name = pick_model(self.client, given, self.home, self.notes)
        self._load(name, self.options)
        self.model = name
        self.home.remember(name)

    def set_option(self, name: str, value: object) -> None:
        """Sets a model option, or its default where `value` is None, if the server accepts it."""
        options = {**self.options, name: value}
        if value is None:
            del options[name]
        self._load(self.model, options)
        self.options = options

    def _load(self, name: str, options: Mapping[str, object]) -> None:
        reply = Reply()
        with Waiting(self.notes) as waiting, closing(self.client.load(name, options)) as replies:
            for reply in replies:
                waiting.tell(reply)
        self._warn(reply)

    def _warn(self, reply: Reply) -> None:
        for warning in reply.warnings:
            note(self.notes, f"Warning: {warning}")

    def complain(self, error: RustllamaError) -> None:
        self.notes.print(Text(f"Error: {one_line(error)}", style="red"))


def rates(reply: Reply, first_token_s: float) -> str:
    """The line of `--verbose`; the durations of a reply are nanoseconds."""
    return (
        f"prompt {reply.prompt_eval_count} tokens ({reply.prompt_eval_cached_count} cached), "
        f"{_per_second(reply.prompt_eval_count - reply.prompt_eval_cached_count, reply.prompt_eval_duration)} · "
        f"answer {reply.eval_count} tokens, {_per_second(reply.eval_count, reply.eval_duration)} · "
        f"load {reply.load_duration / 1e9:.2f} s · queue {reply.queue_duration / 1e9:.2f} s · "
        f"first token {first_token_s:.2f} s"
    )


def _per_second(tokens: int, duration_ns: int) -> str:
    return f"{tokens / duration_ns * 1e9:.1f} tokens/s" if duration_ns > 0 else "- tokens/s"


def converse(chat: Chat, read: Callable[[], str], take: Callable[[Chat, str], None]) -> None:
    """Turn after turn until EOFError. `read` asks the user, `take` does what was said: a command or a question."""
    try:
        while True:
            _turn(chat, read, take)
    except EOFError:
        pass


def _turn(chat: Chat, read: Callable[[], str], take: Callable[[Chat, str], None]) -> None:
    try:
        text = read()
    except KeyboardInterrupt:
        note(chat.notes, "Ctrl+D or /bye leaves.")
        return
    try:
        take(chat, text)
    except KeyboardInterrupt:
        pass  # it stopped the answer
    except RustllamaError as error:
        chat.complain(error)
