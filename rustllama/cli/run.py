"""The verb `run`: chat in the console, or one answer for a script."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from rustllama.cli.format import console_on
from rustllama.cli.home import Home
from rustllama.cli.private import served
from rustllama.errors import BadRequest
from rustllama.settings import Settings

if TYPE_CHECKING:
    from rustllama.cli.chat import Chat


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="\b\nExamples:\n  rustllama run\n  rustllama run llama3.2\n  rustllama run ~/models/llama-3.2.gguf\n"
    "  rustllama run hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF\n"
    '  rustllama run demo "Why is the sky blue?"\n  cat letter.txt | rustllama run llama3.2 "Summarize this:"',
)
@click.argument("model", required=False)
@click.argument("prompt", nargs=-1)
@click.option("--verbose", is_flag=True, help="Show rates and times after each answer.")
def run(model: str | None, prompt: tuple[str, ...], verbose: bool) -> None:
    """Chat with MODEL, or answer PROMPT once.

    MODEL is a name, the path of a GGUF file, or where to pull it from; without one it is the last used, else demo.
    Piped input is answered once too, behind the PROMPT if there is one. Where no server runs, a private one does while
    this command lasts.
    """
    from rustllama.cli.chat import Chat
    from rustllama.cli.pick import pick_model

    if model is not None and model.startswith("-"):  # a prompt may begin so
        raise click.NoSuchOption(model)
    home = Home(Settings.from_env(os.environ).home_path)
    notes = console_on(sys.stderr)
    question = None if sys.stdin.isatty() and not prompt else _question(prompt)
    with served(home, notes) as client:
        chat = Chat(client, "", console_on(sys.stdout), notes, home, verbose)
        if question is None:
            _converse(chat, model)
        else:
            chat.model = pick_model(client, model, home, notes)
            chat.ask(question)
            home.remember(chat.model)


def _question(prompt: tuple[str, ...]) -> str:
    piped = "" if sys.stdin.isatty() else sys.stdin.buffer.read().decode(errors="replace").strip("\r\n")
    question = "\n\n".join(part for part in (" ".join(prompt), piped) if part.strip())
    if not question:
        raise BadRequest("There is nothing to answer: give a PROMPT or pipe some text in.")
    return question


def _converse(chat: Chat, model: str | None) -> None:
    from rustllama.cli.chat import converse
    from rustllama.cli.commands import take
    from rustllama.cli.pick import DEMO
    from rustllama.cli.prompt import no_echo, reader
    from rustllama.cli.render import note

    def take_quietly(chat: Chat, text: str) -> None:
        with no_echo():
            take(chat, text)

    chat.load(model)
    note(chat.notes, f"This is {chat.model}. /help lists the commands, Ctrl+D leaves.")
    if chat.model == DEMO:
        note(
            chat.notes,
            f"{DEMO} is tiny: it knows rustllama and little else. `rustllama run hf.co/USER/REPO` fetches a real model "
            "from Hugging Face, `rustllama run FILE.gguf` takes one that you have.",
        )
    converse(chat, reader(chat), take_quietly)
