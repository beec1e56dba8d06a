"""Requests made from the server's own schema, and in breach of it: no answer is a 5xx, and each is as documented."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.live import live

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ADDRESSES = [
    ("POST", "/v1/moderations"),
    ("POST", "/v1/tokens"),
    ("POST", "/beta/litellm_basic_guardrail_api"),
    ("GET", "/v1/models/{model}"),
]


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    from tests.serve.stub import StubGuard

    with live(StubGuard()) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


def fuzz(operation: Any, mode: GenerationMode, examples: int) -> Counter[int]:
    """How often each status came back.

    Raises:
        FailureGroup: an answer that fails a check.
    """
    seen: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        response = case.call()
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    run: Callable[[], None] = one
    run()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), ADDRESSES)
def test_requests_from_the_schema(schema: Any, method: str, path: str) -> None:
    seen = fuzz(schema[path][method], GenerationMode.POSITIVE, 30)
    assert set(seen) <= {200, 400, 404}
    assert method == "GET" or seen[200] > 5, seen  # the schema's own requests are mostly answered


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), ADDRESSES[:3])
def test_requests_that_break_the_schema(schema: Any, method: str, path: str) -> None:
    seen = fuzz(schema[path][method], GenerationMode.NEGATIVE, 25)
    assert sum(count for status, count in seen.items() if 400 <= status < 500) > 12, seen


def test_the_checks_above_can_fail() -> None:
    from tests.serve.stub import StubGuard

    with live(StubGuard(nan=True)) as address:
        broken = schemathesis.openapi.from_url(f"{address}/openapi.json")
        with pytest.raises((FailureGroup, Failure), match="Server error"):
            fuzz(broken["/v1/moderations"]["POST"], GenerationMode.POSITIVE, 10)
