"""The commands."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tests.figures import crowds, policy, prompts, pulls, shapes, trees, turns

_MODEL = click.argument("model", type=click.Path(exists=True, path_type=Path))
_ROUNDS = click.option("--rounds", default=5, show_default=True)


@click.group(help="Measure the rows of the README's tables that `rustllama bench` alone cannot.")
def figures() -> None: ...


@figures.command("turns", help=turns.__doc__)
@_MODEL
@_ROUNDS
def _turns(model: Path, rounds: int) -> None:
    turns.measure(model, rounds)


@figures.command("shared", help=prompts.shared.__doc__)
@_MODEL
@_ROUNDS
def _shared(model: Path, rounds: int) -> None:
    prompts.shared(model, rounds)


@figures.command("intruder", help=prompts.intruder.__doc__)
@_MODEL
@_ROUNDS
@click.option("--gap-ms", default=200, show_default=True)
@click.option("--answer-tokens", default=500, show_default=True, help="Of each stream; all have to outlast the prompt.")
def _intruder(model: Path, rounds: int, gap_ms: int, answer_tokens: int) -> None:
    prompts.intruder(model, rounds, gap_ms, answer_tokens)


@figures.command("shapes", help=shapes.__doc__)
@_MODEL
@_ROUNDS
@click.option("--streams", default="1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16", show_default=True)
def _shapes(model: Path, rounds: int, streams: str) -> None:
    shapes.measure(model, [int(count) for count in streams.split(",")], rounds)


@figures.command("calls", hidden=True, help=shapes.answer_calls.__doc__)
@_MODEL
def _calls(model: Path) -> None:
    shapes.answer_calls(model, sys.stdin, click.echo)


@figures.command("retained", help=crowds.retained.__doc__)
@_MODEL
@_ROUNDS
def _retained(model: Path, rounds: int) -> None:
    crowds.retained(model, rounds)


@figures.command("adjacent", help=crowds.adjacent.__doc__)
@_MODEL
@_ROUNDS
def _adjacent(model: Path, rounds: int) -> None:
    crowds.adjacent(model, rounds)


@figures.command("deep", help=crowds.deep.__doc__)
@_MODEL
@_ROUNDS
def _deep(model: Path, rounds: int) -> None:
    crowds.deep(model, rounds)


@figures.command("neighbours", help=crowds.neighbours.__doc__)
@_MODEL
@_ROUNDS
def _neighbours(model: Path, rounds: int) -> None:
    crowds.neighbours(model, rounds)


@figures.command("admission", help=policy.admission.__doc__)
@_ROUNDS
def _admission(rounds: int) -> None:
    policy.admission(rounds)


@figures.command("reproducible", help=crowds.reproducible.__doc__)
@_MODEL
@_ROUNDS
def _reproducible(model: Path, rounds: int) -> None:
    crowds.reproducible(model, rounds)


@figures.command("shares", help=crowds.shares.__doc__)
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def _shares(models: tuple[Path, ...]) -> None:
    crowds.shares(list(models))


@figures.command("arrivals", help=prompts.arrivals.__doc__)
@_MODEL
@_ROUNDS
@click.option("--requests", default=60, show_default=True)
def _arrivals(model: Path, rounds: int, requests: int) -> None:
    prompts.arrivals(model, rounds, requests)


@figures.command("drafting", help=crowds.drafting.__doc__)
@_MODEL
@_ROUNDS
def _drafting(model: Path, rounds: int) -> None:
    crowds.drafting(model, rounds)


@figures.command("trees", help=trees.__doc__)
@_MODEL
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_ROUNDS
@click.option("--streams", default=4, show_default=True)
def _trees(model: Path, other: Path, rounds: int, streams: int) -> None:
    trees.measure(model, other, streams, rounds)


@figures.command("pulls", help=pulls.__doc__)
@click.option("--size", default=1000, show_default=True, help="Megabytes.")
@_ROUNDS
def _pulls(size: int, rounds: int) -> None:
    pulls.measure(size * 1_000_000, rounds)


@figures.command("beside", help=pulls.beside.__doc__)
@_MODEL
@_ROUNDS
def _beside(model: Path, rounds: int) -> None:
    pulls.beside(model, rounds)


if __name__ == "__main__":
    figures()
