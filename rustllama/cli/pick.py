"""Which model the console talks to: a name, a GGUF file, a place to pull it from, the last one used, or `demo`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import click
from rich.console import Console

from rustllama.cli.format import clean, spinner
from rustllama.cli.home import Home
from rustllama.cli.pull import fetch
from rustllama.cli.render import note
from rustllama.client import Client
from rustllama.errors import RustllamaError
from rustllama.replies import Model

DEMO = "demo"

_SOURCES = ("hf.co/", "huggingface.co/", "https://", "http://")


def pick_model(client: Client, given: str | None, home: Home, notes: Console) -> str:
    """The name of `given`, which may be a path to a GGUF file; None stands for the last model or `demo`."""
    if given is None:
        return _last(client, home, notes)
    if given.lower().startswith(_SOURCES):
        return _pulled(client, given, notes)
    path = Path(given).expanduser()
    if (os.sep in given or given.lower().endswith(".gguf")) and path.exists():
        return _registered(client, path.absolute(), notes)
    if given.startswith(("/", "./", "../", "~")) or given.lower().endswith(".gguf"):
        raise RustllamaError(f"There is no file {path.absolute()}: `rustllama list` shows the models by name.")
    return given


def _pulled(client: Client, source: str, notes: Console) -> str:
    """The model that is from there, or will be if the user wants it."""
    for model in client.models():
        if _key(source) in (_key(model.name), model.origin.lower()):
            return model.name
    if not (sys.stdin.isatty() and notes.is_terminal):
        raise RustllamaError(f"There is no model {source} yet: `rustllama pull {source}` fetches it.")
    if not click.confirm(f"{clean(source)} is not here yet: fetch it?", default=True, err=True):
        raise click.Abort
    return fetch(client, source, "", notes)


def _last(client: Client, home: Home, notes: Console) -> str:
    last = home.last_model()
    if last is None or last == DEMO:
        return DEMO
    if _key(last) in {_key(model.name) for model in client.models()}:
        return last
    note(notes, f"The model used last, {last}, is gone: this is {DEMO}.")
    return DEMO


def _registered(client: Client, path: Path, notes: Console) -> str:
    models = client.models()
    for model in models:
        if os.path.realpath(model.path) == os.path.realpath(path):
            note(notes, f"{path.name} is registered as {model.name}.")
            return model.name
    name = free_name(path, models)
    with spinner(notes, f"Checking {path.name}"):
        client.create(name, str(path))
    note(notes, f"Registered {path.name} as {name}.")
    return name


def free_name(path: Path, models: list[Model]) -> str:
    """A name after the file that no model has: `llama-3.2-3b-q4_k_m`, else with a number behind it."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)  # the first part of a split model
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-")[:64] or "model"
    taken = {_key(model.name) for model in models}
    numbers = iter(range(2, len(models) + 3))
    candidate = name
    while candidate in taken:
        candidate = f"{name}-{next(numbers)}"
    return candidate


def _key(name: str) -> str:
    return name.lower().removesuffix(":latest")
