"""The schema that the gateway publishes, against what it answers: schemathesis asks every route anything it allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from calotype.embedded import EmbeddedServers
from tests.integration.gateway import Gateway, own_settings
from tests.integration.test_fair_share import CARD

pytestmark = pytest.mark.slow

CHECKS = (status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def gateway(servers: EmbeddedServers) -> Iterator[Gateway]:
    """Without a worker: what waits for an image gives up soon. The bodies of files are bounded."""
    gateway = Gateway(own_settings(servers), max_wait_seconds=0.05, max_file_bytes=2**20)
    gateway.client._store.announce_model(CARD)
    yield gateway
    gateway.stop()


def routes(gateway: Gateway) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")


def test_every_answer_is_documented(gateway: Gateway) -> None:
    """No 5xx, no status, content type or body that the schema does not have; over every route, good and bad input."""
    wrong: dict[str, str] = {}
    asked: Counter[GenerationMode] = Counter()
    for found in routes(gateway).get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]
        for mode in GenerationMode:
            try:
                cases = operation.as_strategy(generation_mode=mode)
                ask(cases, examples=8 if operation.method == "post" else 4)
            except Unsatisfiable:  # a route that takes nothing has no bad input
                assert mode is GenerationMode.NEGATIVE, operation.label
                continue
            except (AssertionError, Failure, FailureGroup) as failure:
                wrong[f"{operation.label} {mode.value}"] = str(failure)
            asked[mode] += 1
    assert not wrong, "\n\n".join(f"{label}: {failure}" for label, failure in wrong.items())
    assert asked[GenerationMode.POSITIVE] > 40
    assert asked[GenerationMode.NEGATIVE] > 30


def ask(cases: SearchStrategy[schemathesis.Case], *, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def check(case: schemathesis.Case) -> None:
        response = case.call_and_validate(checks=list(CHECKS), timeout=20)
        waited = response.status_code == 504 and "wait_timeout" in response.text  # there is no worker here
        assert response.status_code < 500 or waited, f"{case.as_curl_command()}: {response.text}"

    check()
