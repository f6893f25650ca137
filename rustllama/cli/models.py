"""The verbs that look after models: create, list, show, rm, ps, stop."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from rustllama.cli.format import clean, console_on, one_line, print_fields, print_table, since, size, spinner
from rustllama.client import Client
from rustllama.replies import LoadedModel, Model, ModelCard


def _client() -> Client:
    return Client.from_env(os.environ)


@click.command(epilog="\b\nExample:\n  rustllama create llama3.2 ~/models/Llama-3.2-3B-Instruct-Q4_K_M.gguf")
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path))
def create(name: str, path: Path) -> None:
    """Register the GGUF file at PATH under NAME.

    The file is used where it is. Of a split model, PATH is the first part.
    """
    with spinner(console_on(sys.stderr), f"Checking {path.name}"):
        _client().create(name, str(path.expanduser().absolute()))
    click.echo(f"Created {name}: chat with `rustllama run {name}`.")


@click.command("list", epilog="\b\nExample:\n  rustllama list")
def list_models() -> None:
    """List the registered models (also: ls)."""
    listing = _client().listing()
    rows = (
        (model.name, size(model.size), *_details(model), since(model.modified_at), model.origin)
        for model in listing.models
    )
    print_table(console_on(sys.stdout), ("NAME", "SIZE", "PARAMETERS", "QUANTIZATION", "MODIFIED", "ORIGIN"), rows)
    for warning in listing.warnings:
        click.echo(f"Warning: {one_line(warning)}", err=True)


def _details(model: Model) -> tuple[str, str]:
    return model.details.parameter_size, model.details.quantization_level


@click.command(epilog="\b\nExamples:\n  rustllama show demo\n  rustllama show demo --template")
@click.argument("name")
@click.option("--template", is_flag=True, help="Print the chat template alone.")
def show(name: str, template: bool) -> None:
    """Show what a model is."""
    card = _client().show(name)
    if template:
        click.echo(clean(card.template))
    else:
        print_fields(console_on(sys.stdout), describe(card))


def describe(card: ModelCard) -> Iterator[tuple[str, str]]:
    """The rows that `show` and the console's `/show info` print."""
    yield "architecture", card.details.family
    yield "parameters", card.details.parameter_size
    yield "quantization", card.details.quantization_level
    yield "context", f"{card.model_info.get(f'{card.details.family}.context_length', 'unknown')} tokens"
    yield "template", "yes" if card.template else "none in the file: ChatML is used"
    yield "license", (card.license or "none in the file").strip().partition("\n")[0]
    yield "path", card.path
    yield "origin", card.origin or "a local file"
    if card.sha256:
        yield "sha256", card.sha256


@click.command("rm", epilog="\b\nExample:\n  rustllama rm llama3.2")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: tuple[str, ...]) -> None:
    """Remove names; files of yours stay, those that the server keeps itself go with their last name."""
    client = _client()
    for name in names:
        client.delete(name)
        click.echo(f"Removed {name}.")


@click.command(epilog="\b\nExample:\n  rustllama ps")
def ps() -> None:
    """List the models in memory."""
    rows = (
        (
            model.name.removesuffix(":latest"),
            size(model.size),
            str(model.context_length),
            str(model.slots),
            str(model.running),
            _kept(model),
        )
        for model in _client().loaded()
    )
    print_table(console_on(sys.stdout), ("NAME", "SIZE", "CONTEXT", "SLOTS", "RUNNING", "UNTIL"), rows)


def _kept(model: LoadedModel) -> str:
    """Until when it stays in memory; while it answers, that is not known yet."""
    if model.running or model.queued:
        return "in use"
    return since(model.expires_at) if model.expires_at else "for ever"


@click.command(epilog="\b\nExample:\n  rustllama stop llama3.2")
@click.argument("name")
@click.option("--forget", is_flag=True, help="Its computed prompts too, which are kept otherwise.")
def stop(name: str, forget: bool) -> None:
    """Unload a model from memory; running answers end first."""
    _client().unload(name, forget=forget)
    click.echo(f"Stopped {name}.")
