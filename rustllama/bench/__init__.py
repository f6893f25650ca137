"""`rustllama bench`: how fast a server answers, any server of three dialects, and how fast llama.cpp alone would be."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from rustllama.bench.dialects import DIALECTS
from rustllama.bench.load import DEFAULT_URLS, LoadRun, Plan
from rustllama.bench.report import Figures, Intrusion, Spread, as_json, figures, show
from rustllama.client import API_KEY, base_url
from rustllama.settings import Settings

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_COUNT = click.IntRange(1)
_NONE_OR_MORE = click.IntRange(0)


@click.command(
    epilog="\b\nExamples:\n  rustllama bench --model demo -c 4 -n 32\n"
    "  rustllama bench --api openai --url http://localhost:8080 --model any -c 16\n"
    "  rustllama bench -c 4 --answer-tokens 256 --intrude 2000\n"
    "  rustllama bench --compare model.gguf -c 16\n"
    "  rustllama bench --simulate 1b --rate 2 -n 200",
)
@click.option("--url", help="The server; default: RUSTLLAMA_HOST, or the usual port of the --api.")
@click.option("--api", type=click.Choice(list(DIALECTS)), default="rustllama", show_default=True)
@click.option("--model", default="demo", show_default=True)
@click.option(
    "-c", "--concurrency", type=_COUNT, default=1, show_default=True, metavar="N", help="Requests that run at a time."
)
@click.option("-n", "--requests", type=_COUNT, metavar="N", help="Requests in all; default: as --concurrency.")
@click.option(
    "--prompt-tokens", type=_COUNT, default=128, show_default=True, metavar="N", help="Length of each prompt."
)
@click.option(
    "--answer-tokens", type=click.IntRange(2), default=128, show_default=True, metavar="N", help="And of each answer."
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), metavar="R", help="Start R a second, by chance.")
@click.option("--shared-prefix", type=_NONE_OR_MORE, default=0, metavar="N", help="Tokens that all prompts begin with.")
@click.option("--warmup", type=_NONE_OR_MORE, metavar="N", help="Requests before the run; default: as --concurrency.")
@click.option("--intrude", type=_COUNT, metavar="N", help="A prompt of N tokens arrives while all others are answered.")
@click.option("--leave", type=_NONE_OR_MORE, default=0, metavar="N", help="Requests whose client leaves in mid-answer.")
@click.option("--seed", type=int, metavar="N", help="Of the prompts; default: another one each time.")
@click.option("--bare", type=_FILE, metavar="GGUF", help="Run the bare llama.cpp loop, without a server.")
@click.option("--compare", type=_FILE, metavar="GGUF", help="Run a private server and the bare loop in turns.")
@click.option(
    "--simulate",
    type=click.Choice(("135m", "1b", "gpu")),
    help="Run the scheduler alone, in virtual time, with what calls of such a model take.",
)
@click.option("--pairs", type=_COUNT, default=5, show_default=True, metavar="N", help="How often --compare runs both.")
@click.option("--json", "json_wanted", is_flag=True, help="Print JSON.")
def bench(
    json_wanted: bool, bare: Path | None, compare: Path | None, simulate: str | None, pairs: int, **options: object
) -> None:
    """Measure how fast a server answers, any server of three dialects, or llama.cpp alone."""
    plan = _plan(options)
    if compare:
        from rustllama.bench.compare import compare as run_pairs

        found = run_pairs(compare, plan, pairs)
        click.echo(found.as_json() if json_wanted else "\n".join(found.lines()))
    elif simulate:
        _print_simulation(plan, simulate, json_wanted)
    elif bare:
        _print_bare(bare, plan, json_wanted)
    else:
        _print_load(plan, json_wanted)


def _plan(options: dict[str, object]) -> Plan:
    given = {name: value for name, value in options.items() if value is not None}
    defaults: dict[str, object] = {
        "url": DEFAULT_URLS.get(str(given["api"])) or base_url(os.environ.get("RUSTLLAMA_HOST") or "localhost"),
        "api_key": os.environ.get(API_KEY, "").strip(),
        "seed": random.SystemRandom().randrange(1 << 32),
        "requests": given["concurrency"],
        "warmup": given["concurrency"],
    }
    return Plan(**{**defaults, **given})  # type: ignore[arg-type]


def _print_load(plan: Plan, json_wanted: bool) -> None:
    found, disturbed = LoadRun(plan).measure()
    _print(found, disturbed, json_wanted)
    if found.errors:
        raise click.exceptions.Exit(1)


def _print_bare(path: Path, plan: Plan, json_wanted: bool) -> None:
    from rustllama.bench.bare import measure

    settings = Settings.from_env(os.environ)
    _print(measure(path, settings, plan.concurrency, plan.prompt_tokens, plan.answer_tokens), None, json_wanted)


def _print_simulation(plan: Plan, machine: str, json_wanted: bool) -> None:
    from rustllama.bench.simulate import MACHINES, Simulation

    simulation = Simulation(plan, MACHINES[machine], Settings.from_env(os.environ))
    found = figures(simulation.run())
    planning = Spread.of(simulation.planning_s)
    own = {"scheduler p50": planning.p50, "p99": planning.p99} if planning else {}
    _print(replace(found, server_ms=own), None, json_wanted)


def _print(found: Figures, disturbed: Intrusion | None, json_wanted: bool) -> None:
    if json_wanted:
        click.echo(as_json(found, disturbed))
    else:
        show(found, disturbed, Console())
