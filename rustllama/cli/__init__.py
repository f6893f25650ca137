"""The `rustllama` command: its verbs, each imported when it is called, and what the exit status says."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from rustllama import __version__
from rustllama.cli.format import one_line
from rustllama.errors import RustllamaError, SettingError

_VERBS = {
    "serve": "rustllama.cli.serve:serve",
    "run": "rustllama.cli.run:run",
    "pull": "rustllama.cli.pull:pull",
    "create": "rustllama.cli.models:create",
    "list": "rustllama.cli.models:list_models",
    "show": "rustllama.cli.models:show",
    "rm": "rustllama.cli.models:remove",
    "ps": "rustllama.cli.models:ps",
    "stop": "rustllama.cli.models:stop",
    "doctor": "rustllama.cli.doctor:doctor",
    "key": "rustllama.cli.key:key",
    "bench": "rustllama.bench:bench",
}
_ALIASES = {"ls": "list"}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = _VERBS.get(_ALIASES.get(cmd_name, cmd_name))
        if place is None:
            return None
        module, _, name = place.partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExamples:\n  rustllama run                     chat, also without a server\n"
    "  rustllama run ./model.gguf        chat with a model of yours\n"
    "  rustllama serve                   http://localhost:11435 for every program",
)
@click.version_option(__version__, message="rustllama %(version)s")
def verbs() -> None:
    """A local LLM server and console."""


def main() -> None:
    """Runs the command line and exits: 0, 1 for what failed, 2 for bad usage or a bad setting, 130 after Ctrl+C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a narrow locale must not end an answer
    sys.exit(_status())


def _status() -> int:
    try:
        return int(verbs.main(prog_name="rustllama", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except RustllamaError as error:
        click.echo(f"Error: {one_line(error)}", err=True)
        return 2 if isinstance(error, SettingError) else 1
