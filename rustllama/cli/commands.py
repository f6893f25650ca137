"""The slash commands of the console, as a table."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import msgspec
from rich.text import Text

from rustllama.cli.chat import Chat
from rustllama.cli.format import clean, print_fields
from rustllama.cli.models import describe
from rustllama.cli.render import note
from rustllama.errors import BadRequest

PARAMETERS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "num_ctx", "num_predict", "stop"),
    *("repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty"),
    *("num_keep", "num_batch", "num_gpu", "num_thread", "use_mmap", "reproducible"),
)


@dataclass(frozen=True, slots=True)
class Command:
    """`words` are typed as they stand, `argument` is what the user puts behind them; an empty `help` hides it."""

    words: str
    argument: str
    help: str
    action: Callable[[Chat, str], None]


def take(chat: Chat, text: str) -> None:
    """Does what the user typed: a command of the table, or a question to the model."""
    text = text.strip()
    if re.fullmatch(r"/[\w?-]*", text.partition(" ")[0]):
        _dispatch(chat, text)
    elif question := unquoted(text):
        chat.ask(question)


def unquoted(text: str) -> str:
    """Without the triple quotes around a text of several lines."""
    text = text.strip()
    if text.startswith('"""'):
        return text[3:].removesuffix('"""').strip("\n")
    return text


def is_open(text: str) -> bool:
    """Whether triple quotes were opened that the user has still to close."""
    match = re.match(r'\s*(/set\s+system\s+)?"""', text)
    return match is not None and '"""' not in text[match.end() :]


def _dispatch(chat: Chat, text: str) -> None:
    words = text.split(maxsplit=2)
    for count in (2, 1):
        for command in COMMANDS:
            if command.words.split() == words[:count]:
                return command.action(chat, text.split(maxsplit=count)[count] if len(words) > count else "")
    known = [command.words for command in COMMANDS]
    near = get_close_matches(" ".join(words[:2]), known, 1) or get_close_matches(words[0], known, 1) or ["/help"]
    raise BadRequest(f"There is no command {' '.join(words[:2])}: did you mean {near[0]}?")


def _help(chat: Chat, _: str) -> None:
    for command in COMMANDS:
        if command.help:
            line = f"  {command.words} {command.argument}"
            chat.notes.print(Text(f"{line:<36}{command.help}"))
    note(chat.notes, '  """ begins and ends a text of several lines; Ctrl+C stops an answer; Ctrl+D leaves.')


def _leave(_: Chat, __: str) -> None:
    raise EOFError


def _clear(chat: Chat, _: str) -> None:
    chat.messages.clear()
    note(chat.notes, "The conversation starts anew.")


def _load(chat: Chat, name: str) -> None:
    if not name:
        raise BadRequest("/load needs a NAME: `rustllama list` shows them.")
    chat.load(name)
    note(chat.notes, f"This is {chat.model} now.")


def _set_parameter(chat: Chat, text: str) -> None:
    name, _, value = text.partition(" ")
    if not name:
        raise BadRequest(f"/set parameter needs a NAME and a VALUE; the names: {', '.join(PARAMETERS)}.")
    if name not in PARAMETERS:
        near = get_close_matches(name, PARAMETERS, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(PARAMETERS)}."
        raise BadRequest(f"There is no parameter {name[:80]}: {meant}")
    chat.set_option(name, _parameter(name, value.strip()))


def _parameter(name: str, text: str) -> object:
    if not text:
        return None
    try:
        return shlex.split(text) if name == "stop" else msgspec.json.decode(text)
    except (ValueError, msgspec.DecodeError):
        return text


def _set_system(chat: Chat, text: str) -> None:
    chat.system = unquoted(text)


def _set_verbose(chat: Chat, _: str) -> None:
    chat.verbose = True


def _set_quiet(chat: Chat, _: str) -> None:
    chat.verbose = False


def _set_history(chat: Chat, _: str) -> None:
    chat.keeps_history = True


def _set_nohistory(chat: Chat, _: str) -> None:
    chat.keeps_history = False


def _show_info(chat: Chat, _: str) -> None:
    print_fields(chat.notes, describe(chat.client.show(chat.model)))


def _show_system(chat: Chat, _: str) -> None:
    _print(chat, chat.system or "There is no system message: /set system TEXT sets one.")


def _show_parameters(chat: Chat, _: str) -> None:
    lines = [f"{name:<20}{msgspec.json.encode(value).decode()}" for name, value in chat.options.items()]
    _print(chat, "\n".join(lines) or "All parameters have their defaults: /set parameter NAME VALUE sets one.")


def _show_template(chat: Chat, _: str) -> None:
    _print(chat, chat.client.show(chat.model).template or "The file has no template: ChatML is used.")


def _show_messages(chat: Chat, _: str) -> None:
    for message in chat.messages:
        chat.notes.print(Text.assemble((f"{message.role}: ", "bold"), clean(message.content)))


def _print(chat: Chat, text: str) -> None:
    chat.notes.print(Text(clean(text)))


COMMANDS = (
    Command("/help", "", "this list (also /?)", _help),
    Command("/?", "", "", _help),
    Command("/clear", "", "forget what was said", _clear),
    Command("/load", "NAME", "go on with another model, by name or path", _load),
    Command("/set parameter", "NAME VALUE", "set an option; no VALUE: its default", _set_parameter),
    Command("/set system", "TEXT", "set the system message; no TEXT: none", _set_system),
    Command("/set verbose", "", "show the rates after each answer", _set_verbose),
    Command("/set quiet", "", "do not show them", _set_quiet),
    Command("/set history", "", "keep what is typed for later sessions", _set_history),
    Command("/set nohistory", "", "do not keep it", _set_nohistory),
    Command("/show info", "", "what the model is (also /show)", _show_info),
    Command("/show", "", "", _show_info),
    Command("/show system", "", "the system message", _show_system),
    Command("/show parameters", "", "the options that were set", _show_parameters),
    Command("/show template", "", "the model's chat template", _show_template),
    Command("/show messages", "", "the conversation", _show_messages),
    Command("/bye", "", "leave (also /exit, /quit)", _leave),
    Command("/exit", "", "", _leave),
    Command("/quit", "", "", _leave),
)
