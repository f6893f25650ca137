"""Each rule of `tests.rules` is where that says it is."""

from __future__ import annotations

import pytest

from tests.rules import ROOT, RULES, Rule


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_can_be_switched_off(rule: Rule) -> None:
    assert (ROOT / "rustllama" / rule.file).read_text().count(rule.on) == 1
    assert all((ROOT / "tests" / name.partition("::")[0]).is_file() for name in rule.tests.split())
