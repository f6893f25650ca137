"""What /openapi.json describes is asked for with whatever values it allows: the answers are as described."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.hazards import times
from tests.hazards.bodies import PATIENCE_S
from tests.hazards.conftest import Start
from tests.hazards.table import Row

EXAMPLES = times(150, 5)  # of each operation
CHECKS = [
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.status_code_conformance,
]
REFUSED_FOR_MEMORY = 503


Case = schemathesis.Case[Any]


def to_the_model(case: Case) -> Case:
    """Names the model that is there, and asks for an answer that is short."""
    body: Any = case.body
    body["model"] = "demo"
    for place in (body, body.get("options")):
        if isinstance(place, dict):
            place["num_predict"] = 3
    for name in ("max_tokens", "max_completion_tokens"):
        body.pop(name, None)
    return case


def cases(operation: Any) -> strategies.SearchStrategy[Case]:
    """Half of those that ask for an answer get one."""
    any_case: strategies.SearchStrategy[Case] = operation.as_strategy()
    if operation.path not in ("/api/chat", "/api/generate", "/api/show", "/v1/chat/completions"):
        return any_case
    return any_case | any_case.map(to_the_model)


def test_answers_are_as_described(start: Start, row: Row) -> None:
    server = start(MEMORY_LIMIT="2GiB")
    statuses: Counter[int] = Counter()

    @hypothesis.seed(5)
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(data=strategies.data())
    def ask(operation: Any, data: strategies.DataObject) -> None:
        case = data.draw(cases(operation))
        response = case.call(base_url=server.url, timeout=PATIENCE_S)
        statuses[response.status_code] += 1
        wanted = CHECKS if response.status_code == REFUSED_FOR_MEMORY else [not_a_server_error, *CHECKS]
        case.validate_response(response, checks=wanted)

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations: list[Any] = list(schema.get_all_operations())
    for operation in [found.ok() for found in operations]:
        ask(operation)
    row.is_at_least("requests", statuses.total(), 5 * EXAMPLES)
    row.is_at_least("of them answered", statuses[200], EXAMPLES)
    row.is_at_most("5xx that is no lack of memory", sum(statuses[status] for status in (500, 501, 502, 504)), 0)
