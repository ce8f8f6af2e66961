"""The OpenAPI document, and what schemathesis makes of it: any request that it describes, and any that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from schemathesis.core.result import Ok

from tests.support.beside import beside
from tests.support.serving import Served, in_thread

FEW, MANY = 1, 150


def test_the_document_is_made_from_the_models(server: Served) -> None:
    with server.client() as client:
        document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/tokenizer_info",
        "/health", "/metrics",
    }  # fmt: skip
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    request = schemas["CompletionRequest"]
    assert request["required"] == ["prompt"]
    assert request["properties"]["seed"]["anyOf"][0] == {
        "type": "integer",
        "minimum": -(2**63),
        "exclusiveMaximum": 2**63,
    }
    protocol = beside(7, "serving.protocol")
    assert set(request["properties"]) == set(protocol.CompletionRequest.model_fields)


def check_all(server: Served, examples: int) -> None:
    """Send generated requests, good and bad; every answer must be one that the document describes, and none a 5xx."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    named = schemathesis.checks
    checks = [named.not_a_server_error, named.status_code_conformance, named.content_type_conformance,
              named.response_schema_conformance]  # fmt: skip
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing can be wrong with it

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            def check(case: Any) -> None:
                if isinstance(case.body, dict):
                    case.body = {**case.body, **({"max_tokens": 2} if "max_tokens" in case.body else {})}
                case.call_and_validate(checks=checks, timeout=60)

            check()


def test_no_generated_request_makes_the_server_fail(server: Served) -> None:
    check_all(server, FEW)


@pytest.mark.slow
def test_no_generated_request_makes_a_drafting_server_fail() -> None:
    with in_thread(model="stdlib-10m", batch_size=8) as served:
        check_all(served, MANY)
        assert served.rests()
