"""The verb `serve`: its options are the RUSTLLAMA_* settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import click

from rustllama.errors import SettingError
from rustllama.settings import Settings, parse_address, switches, table

T = TypeVar("T", bound=Callable[..., object])


def _settings_as_options(function: T) -> T:
    for variable, default, meaning in reversed(table()):
        name = variable.removeprefix("RUSTLLAMA_").lower().replace("_", "-")
        shown = f"{variable}, {default}" if default else variable
        text = f"{meaning}  [{shown}]"
        if variable in switches():  # the VALUE may be left out
            option = click.option(f"--{name}", variable, is_flag=False, flag_value="1", metavar="VALUE", help=text)
        else:
            option = click.option(f"--{name}", variable, metavar="VALUE", help=text)
        function = option(function)
    return function


@click.command(
    epilog="\b\nExamples:\n  rustllama serve\n  rustllama serve --load demo --keep-alive -1\n"
    "  RUSTLLAMA_MEMORY_LIMIT=8GiB rustllama serve --port 8080",
)
@click.option("--port", type=click.IntRange(0, 65535), help="port to listen at; 0 takes a free one")
@_settings_as_options
def serve(port: int | None, **given: str | None) -> None:
    """Serve the registered models over HTTP until Ctrl+C.

    In brackets: the environment variable that an option stands for, and its default.
    """
    environ = {**os.environ, **{variable: value for variable, value in given.items() if value is not None}}
    if port is not None:
        environ["RUSTLLAMA_HOST"] = _with_port(environ.get("RUSTLLAMA_HOST") or "localhost", port)
    settings = Settings.from_env(environ)

    from rustllama.serve import main  # Flask, Gunicorn and llama.cpp, for settings that are right

    main(settings)


def _with_port(address: str, port: int) -> str:
    try:
        host, _ = parse_address(address)
    except ValueError as error:
        raise SettingError(f"RUSTLLAMA_HOST={address!r} is not valid: expected {error}.") from None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
