"""The verb `doctor`: a line for each finding, and an exit status that says whether something is wrong."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from rustllama.cli.format import console_on, one_line
from rustllama.errors import RustllamaError

if TYPE_CHECKING:
    from rustllama.doctor.finding import Finding

_STYLES = {"ok": "green", "hint": "yellow", "wrong": "bold red"}
_WRONG = 1  # exit status


@click.command(epilog="\b\nExamples:\n  rustllama doctor\n  rustllama doctor --json")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
def doctor(as_json: bool) -> None:
    """Tell what this machine has and could run, and what is wrong.

    Nothing is changed and no server is needed. The exit status is 1 when something is wrong.
    """
    try:
        from rustllama.doctor import examine  # numpy, peewee
    except ImportError as error:
        raise RustllamaError(f"The installation lacks {error.name}: install rustllama again with pip.") from None

    findings = examine(os.environ)
    is_wrong = any(finding.mark.value == "wrong" for finding in findings)
    if as_json:
        _print_json(findings, is_wrong)
    else:
        _print(findings)
    if is_wrong:
        sys.exit(_WRONG)


def _print_json(findings: list[Finding], is_wrong: bool) -> None:
    import msgspec

    text = msgspec.json.format(msgspec.json.encode({"ok": not is_wrong, "findings": findings}), indent=2)
    click.echo(text.decode())


def _print(findings: list[Finding]) -> None:
    from rich.text import Text

    console = console_on(sys.stdout)
    for finding in findings:
        mark = finding.mark.value
        line = Text.assemble((f"{mark:<6}", _STYLES[mark]), (f"{finding.about:<13}", "bold"), one_line(finding.text))
        console.print(line, soft_wrap=True)
