"""The house's one law: imports go down only, and each outside thing has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rustllama"

# A module belongs to the layer of its longest prefix here.
LAYERS = {
    **dict.fromkeys(("__init__", "errors", "origin", "settings", "core", "keys"), "words"),
    **dict.fromkeys(("gguf", "templates", "template_helper", "database", "registry"), "leaves"),
    **dict.fromkeys(("probe", "rlimits", "addresses", "verdicts", "model_files", "pull"), "leaves"),
    "engine": "pure engine",
    **dict.fromkeys(
        ("bridge", "engine.arranger", "engine.runner", "engine.lane", "engine.engine", "engine.manager"), "live engine"
    ),
    **dict.fromkeys(("engine.lease", "engine.facts", "engine.disk_store"), "live engine"),
    "engine.native": "native",
    "api": "api",
    **dict.fromkeys(("client", "replies", "cli", "__main__"), "console"),
    **dict.fromkeys(("bench", "demo", "doctor"), "tools"),
    **dict.fromkeys(("probe_child", "amx_child", "template_child", "pull_child"), "tools"),
    **dict.fromkeys(("serve", "deaths", "worker", "tls", "gunicorn_conf", "connections", "client_socket"), "tools"),
}
MAY_IMPORT = {
    "words": {"words"},
    "leaves": {"words"},
    "pure engine": {"words", "pure engine"},
    "native": {"words", "pure engine", "native"},
    "live engine": {"words", "leaves", "pure engine", "native", "live engine"},
    "api": {"words", "leaves", "pure engine", "live engine", "api"},
    "console": {"words", "console"},
    "tools": set(LAYERS.values()),
}
ALSO = {
    ("registry", "gguf"),  # a record is made of what the header says
    ("registry", "database"),
    ("verdicts", "registry"),  # they lie among its facts
    ("pull.public", "addresses"),
    ("cli.key", "registry"),  # keys are made on the database itself
    ("cli.doctor", "doctor.finding"),  # the type of what it prints
    ("template_helper", "templates"),  # what is sent to the helper is what templates are made of
}
DOORS = {
    "llama_cpp": {"engine.native"},
    "gevent": {"bridge", "serve", "worker", "tls", "gunicorn_conf"},
    "peewee": {"registry", "database"},
    "prometheus_client": {"api.metrics"},
}
HEAVY = {"flask", "gevent", "peewee", "llama_cpp"}


@dataclass(frozen=True, slots=True)
class Import:
    """`target` is absolute; `lazy`: it happens in a function."""

    source: str
    target: str
    lazy: bool

    @property
    def inside(self) -> str | None:
        """The module of ours that it means."""
        package, _, name = self.target.partition(".")
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        return (name or "__init__") if package == "rustllama" else None

    @property
    def allowed(self) -> bool:
        target = self.inside
        if target is None or _package(target) == _package(self.source) or (self.source, target) in ALSO:
            return True
        if self.lazy and _layer(self.source) == "console" and _layer(target) == "tools":
            return True
        return _layer(target) in MAY_IMPORT.get(_layer(self.source), ())


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _layer(name: str) -> str:
    while name and name not in LAYERS:
        name = name.rpartition(".")[0]
    return LAYERS.get(name, "none")


def _package(name: str) -> str:
    """What a module shares with those that may import it freely; the engine's layers divide its package."""
    return name if name.startswith("engine") else name.partition(".")[0]


def _imports(source: str, node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(source, alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{source}: a relative import hides where it goes"
            yield from (Import(source, f"{child.module}.{alias.name}", lazy) for alias in child.names)
        else:
            yield from _imports(source, child, lazy or isinstance(child, (ast.FunctionDef, ast.Lambda)))


IMPORTS = [found for name, path in MODULES.items() for found in _imports(name, ast.parse(path.read_text()))]


def test_every_module_has_a_layer() -> None:
    assert [name for name in MODULES if _layer(name) == "none"] == []


def test_imports_go_down_only() -> None:
    assert [(found.source, found.target) for found in IMPORTS if not found.allowed] == []


def test_the_words_import_only_those_before_them() -> None:
    order = ["__init__", "errors", "origin", "settings", "core", "keys"]
    ours = [(found.inside, found.source) for found in IMPORTS if found.inside and found.source in order]
    assert ours
    assert all(order.index(target) < order.index(source) for target, source in ours)


@pytest.mark.parametrize("outside", DOORS)
def test_an_outside_thing_has_one_door(outside: str) -> None:
    users = {found.source for found in IMPORTS if found.target.partition(".")[0] == outside}
    assert users
    assert all(any(f"{user}.".startswith(f"{door}.") for door in DOORS[outside]) for user in users)


def test_the_law_catches_a_breach() -> None:
    assert not Import("gguf.header", "rustllama.registry.Registry", False).allowed
    assert not Import("api.ollama", "rustllama.engine.native.Model", False).allowed
    assert not Import("cli.run", "rustllama.bench.bench", False).allowed
    assert not Import("engine.scheduler", "rustllama.bridge.offload", True).allowed
    assert Import("cli.run", "rustllama.bench.bench", True).allowed


@pytest.mark.parametrize("arguments", [["--help"], ["list"], *([verb, "--help"] for verb in ("list", "key", "doctor"))])
def test_the_console_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, rustllama.cli\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    rustllama.cli.main()\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    environ = {"RUSTLLAMA_HOST": "127.0.0.1:1", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
