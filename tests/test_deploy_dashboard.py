"""The Grafana dashboard asks only for what the server tells; and nginx keeps that on the machine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.conftest import Server
from tests.nginx import DEPLOY, Nginx, needs_nginx
from tests.scrape import Scrape

DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
FROM_PROMETHEUS = {"job", "instance"}


def expressions() -> Iterator[str]:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        yield variable["query"]["query"] if variable["type"] == "query" else ""


def metrics(expression: str) -> list[str]:
    return re.findall(r"\b(?:rustllama|process)_\w+", expression)


def selectors(expression: str) -> list[tuple[str, str]]:
    """Each metric with a label that it is asked for."""
    asked = re.findall(r"\b(\w+)\{(.*?)\}", expression) + re.findall(r"label_values\((\w+), (\w+)\)", expression)
    return [(name, label) for name, labels in asked for label in re.findall(r"(\w+)(?:[=!]|$)", labels)]


def groupings(expression: str) -> set[str]:
    return {label for labels in re.findall(r"\b(?:by|on) \((.*?)\)", expression) for label in labels.split(", ")}


@pytest.fixture(scope="module")
def scrape(server: Server) -> Scrape:
    """Of a server that has answered, at least once with the cores to itself: other calls tell nothing of their cost."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "why is the sky blue?"}]}
    for _ in range(1200):
        requests.post(f"{server.url}/api/chat", json=body, timeout=60).raise_for_status()
        found = Scrape(requests.get(f"{server.url}/metrics", timeout=60).text)
        if found.named("rustllama_decode_call_seconds"):
            break
        time.sleep(0.1)
    return found


def test_the_server_tells_all_that_the_dashboard_asks_for(scrape: Scrape) -> None:
    asked = {name for expression in expressions() for name in metrics(expression)}
    assert len(asked) > 20
    assert {name for name in asked if not scrape.named(name)} == set()


def test_the_dashboard_asks_for_every_family(scrape: Scrape) -> None:
    asked = {name for expression in expressions() for name in metrics(expression)}
    ours = [family for family in scrape.families if family.name.startswith("rustllama_")]
    assert [family.name for family in ours if not {sample.name for sample in family.samples} & asked] == []


def test_the_dashboard_selects_by_labels_that_there_are(scrape: Scrape) -> None:
    asked = {selector for expression in expressions() for selector in selectors(expression)}
    assert {label for _, label in asked} == {"model", "source", "outcome", "status", "result"}
    assert [(name, label) for name, label in asked if label not in scrape.named(name)[0].labels] == []


def test_the_dashboard_groups_by_labels_that_there_are(scrape: Scrape) -> None:
    for expression in expressions():
        known = {label for name in metrics(expression) for label in scrape.named(name)[0].labels}
        assert groupings(expression) <= known | FROM_PROMETHEUS, expression


def test_a_legend_names_labels_that_its_expression_leaves() -> None:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= groupings(target["expr"]) | FROM_PROMETHEUS, target["expr"]


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_every_panel_reads_from_the_chosen_source() -> None:
    sources = [panel["datasource"] for panel in PANELS if panel["type"] != "row"]
    sources += [target["datasource"] for panel in PANELS for target in panel.get("targets", ())]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "model"]


@needs_nginx
@pytest.mark.parametrize(
    "path", ["/metrics", "//metrics", "/%6detrics", "/api/../metrics", "/metrics?x=1", "/metrics/"]
)
def test_no_metrics_go_through_nginx(tmp_path: Path, server: Server, path: str) -> None:
    with Nginx(tmp_path, urlsplit(server.url).netloc) as nginx:
        answer = nginx.ask("GET", path)
        assert answer.status == 404
        assert json.loads(answer.read())["error"]
