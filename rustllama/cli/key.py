"""The verb `key`: API keys, made and removed on the database itself, whether a server runs or not."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import click

from rustllama.cli.format import console_on, print_table, since
from rustllama.client import API_KEY
from rustllama.keys import ApiKey, check_key_name, digest_of, new_secret
from rustllama.settings import Settings

if TYPE_CHECKING:
    from rustllama.registry import Registry


def _rate(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,8})(/min)?", value)
    if not found:
        raise click.BadParameter(f"{value!r} is not a rate like 60/min.")
    return int(found[1])


@click.group(
    epilog="\b\nExamples:\n  rustllama key add laptop\n"
    "  rustllama key add website --chat-only --models demo --rate 60/min\n  rustllama key rm website"
)
def key() -> None:
    """Make, list and remove API keys.

    They are in the database of RUSTLLAMA_HOME, for which no server has to run; one that runs follows within seconds. As
    soon as there is one key, every request needs one.
    """


@key.command(epilog="\b\nExample:\n  rustllama key add website --chat-only --models demo,llama3.2 --rate 60/min")
@click.argument("name")
@click.option("--models", default="", metavar="A,B", help="Only for these models; default: all.")
@click.option("--rate", metavar="N/min", callback=_rate, help="Requests a minute, for each server process.")
@click.option("--concurrency", type=click.IntRange(1), metavar="N", help="Requests at a time, for each server process.")
@click.option("--chat-only", is_flag=True, help="It may not create or delete models.")
def add(name: str, models: str, rate: int | None, concurrency: int | None, chat_only: bool) -> None:
    """Make a key and print it, this once."""
    from rustllama.registry import canonical, check_name, timestamp

    secret = new_secret()
    chosen = tuple(canonical(check_name(model)) for model in models.split(",") if model.strip())
    made = ApiKey(
        check_key_name(name), digest_of(secret), timestamp(), chosen, rate, concurrency, may_manage=not chat_only
    )
    _registry().add_api_key(made)
    click.echo(secret)
    click.echo(
        f"This is the key '{name}', shown this once. Programs send it as `Authorization: Bearer KEY`; rustllama's own "
        f"commands take it from {API_KEY}.",
        err=True,
    )


@key.command("list", epilog="\b\nExample:\n  rustllama key list")
def list_keys() -> None:
    """List the keys; what they are cannot be shown again."""
    rows = (
        (
            key.name,
            since(key.created_at),
            "chat, manage" if key.may_manage else "chat",
            ", ".join(key.models) or "all",
            f"{key.rate_per_min}/min" if key.rate_per_min else "no limit",
            str(key.concurrency or "no limit"),
        )
        for key in _registry().api_keys()
    )
    print_table(console_on(sys.stdout), ("NAME", "CREATED", "MAY", "MODELS", "RATE", "AT A TIME"), rows)


@key.command("rm", epilog="\b\nExample:\n  rustllama key rm website")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: tuple[str, ...]) -> None:
    """Remove keys."""
    registry = _registry()
    for name in names:
        registry.delete_api_key(name)
        click.echo(f"Removed {name}.")
    if not registry.api_keys():
        click.echo("No key is left: a server on loopback is open to its machine again, others let nobody in.", err=True)


def _registry() -> Registry:
    from rustllama.registry import Registry  # peewee

    return Registry(Settings.from_env(os.environ).database_path)
