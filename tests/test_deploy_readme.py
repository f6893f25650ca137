"""What the README says of settings and commands is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rustllama.cli import verbs
from rustllama.client import API_KEY, CA
from rustllama.settings import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_two_commands_stand_as_promised() -> None:
    assert "\npython3 -m venv .venv && . .venv/bin/activate && pip install . && rustllama run\n" in README
    assert "\npip install tox && tox\n" in README
    assert "pip install tox && tox" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(("variable", "default", "meaning"), table())
def test_every_setting_has_its_row(variable: str, default: str, meaning: str) -> None:
    shown = f"`{default}`" if default else ""
    assert f"| `{variable}` | {shown} | {meaning} |\n" in README


def test_no_setting_is_named_that_does_not_exist() -> None:
    known = {variable for variable, _, _ in table()} | {API_KEY, CA}
    assert set(re.findall(r"RUSTLLAMA_\w+", README)) == known


def test_every_verb_is_named_and_every_named_verb_exists() -> None:
    known = set(verbs.list_commands(None))  # type: ignore[arg-type]
    assert set(re.findall(r"(?:`|^|\n)rustllama ([a-z]+)", README)) == known


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
