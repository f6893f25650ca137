"""The verb `pull`, and how a pull looks: a bar for each file on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from rustllama.cli.format import clean, console_on, one_line, size
from rustllama.client import Client
from rustllama.replies import Pulled
from rustllama.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

_TENTHS = 10  # plain lines for a file


@click.command(
    epilog="\b\nExamples:\n  rustllama pull hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF llama3.2\n"
    "  rustllama pull hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q8_0\n"
    "  rustllama pull https://example.com/models/model.gguf\n"
    "  rustllama pull registry.ollama.ai/library/llama3.2:3b"
)
@click.argument("source")
@click.argument("name", required=False, default="")
def pull(source: str, name: str) -> None:
    """Fetch the model at SOURCE and register it, as NAME or as what SOURCE calls it.

    What was begun goes on where it stopped. Behind hf.co/USER/REPO, a ':' alone lists which quantizations there are.
    """
    from rustllama.cli.home import Home
    from rustllama.cli.private import served

    notes = console_on(sys.stderr)
    with served(Home(Settings.from_env(os.environ).home_path), notes) as client:
        model = fetch(client, source, name, notes)
    click.echo(f"Pulled {model}: chat with `rustllama run {model}`.")


def fetch(client: Client, source: str, name: str, notes: Console) -> str:
    """Pulls and shows it on `notes`; the name of the model. Ctrl+C says how to go on, and goes its way."""
    try:
        with closing(client.pull(source, name)) as lines:
            return _shown(lines, notes)
    except KeyboardInterrupt:
        again = " ".join(filter(None, ("rustllama pull", source, name)))
        notes.print(f"Stopped. What is here stays: `{one_line(again)}` goes on.", markup=False, soft_wrap=True)
        raise


def _shown(lines: Iterable[Pulled], notes: Console) -> str:
    if notes.is_terminal and not notes.is_dumb_terminal:
        return _drawn(lines, notes)
    return _listed(lines, notes)


def _drawn(lines: Iterable[Pulled], notes: Console) -> str:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), DownloadColumn()),
        *(TransferSpeedColumn(), TimeRemainingColumn(compact=True)),
    )
    model = ""
    with Progress(*columns, console=notes) as bars:
        tasks = {}
        for line in lines:
            status, model = one_line(line.status), line.model
            if not line.total:
                bars.console.print(status, markup=False, style="dim")
            elif status not in tasks:
                tasks[status] = bars.add_task(status, total=line.total, completed=line.completed)
            else:
                bars.update(tasks[status], completed=line.completed)
    return clean(model)


def _listed(lines: Iterable[Pulled], notes: Console) -> str:
    """A line for each status, and of a file one at each tenth."""
    model, last = "", ("", 0)
    for line in lines:
        status, model = one_line(line.status), line.model
        tenth = _TENTHS * line.completed // line.total if line.total else 0
        if (status, tenth) != last:
            progress = f": {100 * line.completed // line.total} % of {size(line.total)}" if line.total else ""
            notes.print(f"{status}{progress}", markup=False, soft_wrap=True)
            last = status, tenth
    return clean(model)
